"""Stage 1: which heads are static. Text-centric scores from the question's own rows.

Shapes: `K` KV heads, `G` query heads per KV head, `T` text rows, `N` cached tokens.
"""

from __future__ import annotations

import math

import torch


def top_k_count(ratio: float, tokens: int) -> int:
    """k of the score for `tokens` cached tokens: at least 1, at most `tokens`."""
    return max(1, min(tokens, math.ceil(ratio * tokens)))


def merge_top_k(best: torch.Tensor | None, weights: torch.Tensor, k: int) -> torch.Tensor:
    """Fold one block of attention weights into the running top k of each row.

    best: `(K, G, T, <=k)` or None before the first block. weights: `(K, G, T, n)`, a block of rows that are
    normalised over *all* keys. Returns `(K, G, T, min(k, seen))`, unordered.
    """
    block = weights.topk(min(k, weights.shape[-1]), dim=-1, sorted=False).values
    if best is None:
        return block
    both = torch.cat((best, block), dim=-1)
    return both.topk(min(k, both.shape[-1]), dim=-1, sorted=False).values


def text_centric_scores(best: torch.Tensor, group: str = "mean") -> torch.Tensor:
    """S of each KV head, `(K,)` in [0, 1], from the rows' top k `(K, G, T, k)`.

    HybridKV, stage 1: S = mean over text rows of the sum of the row's top-k attention weights. The mean or maximum over
    the group's query heads is ours (the paper does not cover grouped-query attention).
    """
    scores = best.sum(-1).mean(-1)
    return (scores.amax(-1) if group == "max" else scores.mean(-1)).clamp(0.0, 1.0)


def tokens_to_cover(halves: torch.Tensor, sinks: int, recent: int, shares: tuple[float, ...]) -> torch.Tensor:
    """Fewest tokens, chosen by some rows, with which a head keeps each share of *other* rows' attention (ours).

    halves `(2, K, N)`: mean attention of two halves of the text rows. Each half ranks the tokens between the first
    `sinks` and the last `recent`, which a head keeps anyway. The other half's attention to the best of them and to the
    recent ones is added up, and the sums of both directions averaged. Returns `(len(shares), K)`; N + 1 where not even
    all tokens are enough.

    This measures what pruning by some rows costs other rows. The text-centric score measures how few tokens a row
    attends to, even if every row attends to different ones.

    Attention to the sinks is left out: a head that attends only to them retrieves nothing *yet*, which does not show
    what it would retrieve.
    """
    old, n = halves.shape[-1] - recent, halves.shape[-1]
    first = min(sinks, old)
    covered = torch.zeros((halves.shape[1], old - first + 1), dtype=torch.float32, device=halves.device)
    for chosen_by, seen_by in ((halves[0], halves[1]), (halves[1], halves[0])):
        order = chosen_by[:, first:old].argsort(dim=-1, descending=True)
        covered[:, 1:] += seen_by[:, first:old].gather(1, order).cumsum(-1)
        covered += seen_by[:, old:].sum(-1, keepdim=True)
    enough = torch.stack([covered >= share * covered[:, -1:] for share in shares])
    return torch.where(enough.any(-1), enough.byte().argmax(-1), n + 1)


LEAST_ROWS = 16
"""With fewer text rows a head's need is not measured."""
SPREAD_SHARE = 0.9
"""Dynamic heads' budgets are weighted by the tokens that cover this share of their attention."""


def static_heads(scores: torch.Tensor, theta: float) -> torch.Tensor:
    """Boolean mask of static heads, same shape as `scores`: S >= theta (HybridKV, stage 1)."""
    return scores >= theta
