"""Stage 3, dynamic heads: which chunks a step attends to.

Shapes: `K` KV heads, `G` query heads per KV head, `n` chunks, `D` head dim.
"""

from __future__ import annotations

import torch


def mean_share(logits: torch.Tensor) -> torch.Tensor:
    """`(K, G, n)` -> `(K, n)`: mean over the group's query heads of the softmax over chunks (FreeKV).

    A maximum lets one sharp head crowd out the others.
    """
    return logits.softmax(-1).mean(1)


def max_share(logits: torch.Tensor) -> torch.Tensor:
    """`(K, G, n)` -> `(K, n)`: maximum over the group's query heads of the softmax over chunks."""
    return logits.softmax(-1).amax(1)


def max_logit(logits: torch.Tensor) -> torch.Tensor:
    """`(K, G, n)` -> `(K, n)`: maximum over the group's query heads of the bare logits (Quest's rule, for groups)."""
    return logits.amax(1)


GROUPS = {"mean": mean_share, "max": max_share, "max_logit": max_logit}


def ranked_chunks(share: torch.Tensor, count: int) -> torch.Tensor:
    """Indices `(K, count)` of the best chunks, best first. `count` at most `share.shape[-1]`."""
    return share.topk(count, dim=-1).indices


def only(ranked: torch.Tensor, begin: torch.Tensor | int, end: torch.Tensor) -> torch.Tensor:
    """`ranked` `(n, m)` with -1 but for the places begin..end of each row, both `(n, 1)`."""
    place = torch.arange(ranked.shape[1], device=ranked.device)
    return torch.where((place >= begin) & (place < end), ranked, -1)


def query_similarity(query: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """`(K,)`: cosine of each query head `(K, G, D)` with itself a step before, averaged over the group (FreeKV)."""
    return torch.cosine_similarity(query.float(), before.float(), dim=-1).mean(1)
