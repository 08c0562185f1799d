"""Stage 3, static heads: text-prior pruning, once per question."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pool_saliency(saliency: torch.Tensor, width: int) -> torch.Tensor:
    """Average over `width` neighbouring tokens, edges over the tokens there are: `(..., N)` -> `(..., N)` (SnapKV)."""
    if width == 1 or saliency.shape[-1] == 0:
        return saliency
    flat = saliency.reshape(-1, 1, saliency.shape[-1])
    pooled = F.avg_pool1d(flat, width, stride=1, padding=width // 2, count_include_pad=False)
    return pooled.reshape(saliency.shape)


def kept_tokens(saliency: torch.Tensor, is_text: torch.Tensor, sinks: int, budget: int) -> torch.Tensor:
    """Which of the first `n` tokens a static head keeps: ascending indices, `min(budget, n)` of them.

    saliency `(n,)`: attention the text rows pay each token. is_text `(n,)`: text outranks every visual token
    (HybridKV, "text-prior"), the first `sinks` tokens outrank all; within a class the more salient wins, so text
    that alone exceeds the budget is ranked among itself.
    """
    n = saliency.shape[-1]
    budget = min(budget, n)
    ranks = is_text.long()
    ranks[:sinks] = 2
    by_saliency = saliency.argsort(descending=True, stable=True)
    by_class = ranks[by_saliency].argsort(descending=True, stable=True)
    return by_saliency[by_class[:budget]].sort().values
