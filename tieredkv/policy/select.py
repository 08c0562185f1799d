"""Stage 3, dynamic heads: which chunks a step attends to."""

from __future__ import annotations

import torch


def group_share(logits: torch.Tensor) -> torch.Tensor:
    """Rank of each chunk for a KV head: `(K, n)` from estimated logits `(K, G, n)`.

    Mean over the group's query heads of the softmax over chunks (FreeKV); a maximum instead lets one sharp head
    crowd out the others.
    """
    return logits.softmax(-1).mean(1)


def ranked_chunks(share: torch.Tensor, count: int) -> torch.Tensor:
    """Indices `(K, count)` of the best chunks, best first. `count` at most `share.shape[-1]`."""
    return share.topk(count, dim=-1).indices
