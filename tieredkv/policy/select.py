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


def chosen_mask(chosen: torch.Tensor, chunks: int) -> torch.Tensor:
    """`(K, chunks)` bool: which were chosen. chosen `(K, m)`, -1 for none."""
    out = torch.zeros((chosen.shape[0], chunks), dtype=torch.int8, device=chosen.device)
    return out.scatter_reduce_(1, chosen.clamp(min=0), (chosen >= 0).to(out.dtype), reduce="amax").bool()


def favoured(share: torch.Tensor, before: torch.Tensor, stay: float) -> torch.Tensor:
    """Ranks `(K, n)` with those of the chunks chosen a step before, `(K, m)`, `stay` times as high (ours)."""
    return torch.where(chosen_mask(before, share.shape[1]), share * stay, share)


def ranked_chunks(share: torch.Tensor, count: int) -> torch.Tensor:
    """Indices `(K, count)` of the best chunks, best first. `count` at most `share.shape[-1]`."""
    return share.topk(count, dim=-1).indices


def only(ranked: torch.Tensor, begin: torch.Tensor | int, end: torch.Tensor) -> torch.Tensor:
    """`ranked` `(n, m)` with -1 but for the places begin..end of each row, both `(n, 1)`."""
    place = torch.arange(ranked.shape[1], device=ranked.device)
    return torch.where((place >= begin) & (place < end), ranked, -1)


def log_mass_without(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp `(K, G)` of logits `(K, G, n)` over all chunks but the chosen `(K, m)`, -1 for none."""
    return logits.masked_fill(chosen_mask(chosen, logits.shape[2]).unsqueeze(1), float("-inf")).logsumexp(-1)


def unseen_share(unselected: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Share of attention mass `(K,)` that a step did not see: the group's mean, from both parts' log-sum-exp `(K, G)`.

    Ours. As true as the digests' logits are: of sketches, not of boxes, which promise more than their chunks hold.
    """
    return torch.sigmoid(unselected - seen).mean(-1)


MUCH_UNSEEN = 0.1
"""Share of attention mass whose loss is worth more chunks."""


def adapted(selected: torch.Tensor, unseen: torch.Tensor, least: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """How many chunks each head selects next, `(K, 1)`, least <= it <= most (ours).

    A quarter more where much went unseen, a quarter less where less than half as much did.
    """
    quarter = (selected + 3) // 4
    much, little = unseen > MUCH_UNSEEN, unseen < MUCH_UNSEEN / 2
    change = torch.where(much, 1, torch.where(little, -1, 0)).unsqueeze(1) * quarter
    return torch.minimum(torch.maximum(selected + change, least), most)


def query_similarity(query: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """`(K,)`: cosine of each query head `(K, G, D)` with itself a step before, averaged over the group (FreeKV)."""
    return torch.cosine_similarity(query.float(), before.float(), dim=-1).mean(1)
