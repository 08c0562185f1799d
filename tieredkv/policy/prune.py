"""Stage 3, static heads: which tokens they keep, once per question. Rules that several presets share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class HeadTokens:
    """Input of a rule: the first `n` tokens of one static head, all before the recent region."""

    saliency: torch.Tensor
    """`(n,)` float32: attention the last text rows pay each token, mean over rows and the group's query heads."""
    is_text: torch.Tensor
    """`(n,)` bool."""
    sinks: int
    """First tokens that a rule may want to protect."""
    pool: int
    """Width of the average over neighbours (`Policy.saliency_pool`)."""
    read: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    """Returns keys and values, each `(n, D)`; called only by rules that need them."""


def pool_saliency(saliency: torch.Tensor, width: int) -> torch.Tensor:
    """Average over `width` neighbouring tokens, fewer at the edges: `(..., N)` -> `(..., N)` (SnapKV)."""
    if width == 1 or saliency.shape[-1] == 0:
        return saliency
    flat = saliency.reshape(-1, 1, saliency.shape[-1])
    pooled = F.avg_pool1d(flat, width, stride=1, padding=width // 2, count_include_pad=False)
    return pooled.reshape(saliency.shape)


def by_saliency(tokens: HeadTokens) -> torch.Tensor:
    """The last rows' attention, smoothed over neighbours (SnapKV)."""
    return pool_saliency(tokens.saliency, tokens.pool)


def text_prior(tokens: HeadTokens) -> torch.Tensor:
    """Text before any visual token, the first `sinks` tokens before all; within a class the more salient first.

    HybridKV's "text-prior pruning"; the saliency is ours (SnapKV's). Where text alone exceeds the budget, the most
    salient text is kept.
    """
    saliency = pool_saliency(tokens.saliency, tokens.pool).double()  # in float32, adding the class would round it away
    classes = tokens.is_text.double()
    classes[: tokens.sinks] = 2
    return saliency + 2 * classes  # a mean of attention weights is at most 1


def kept_tokens(rank: torch.Tensor, budget: int) -> torch.Tensor:
    """Ascending indices of the `min(budget, n)` tokens of highest rank `(n,)`; ties go to the earlier token."""
    count = min(budget, rank.shape[-1])
    if count in (0, rank.shape[-1]):
        return torch.arange(count, device=rank.device)
    rank = rank.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    last = rank.kthvalue(rank.shape[-1] - count + 1).values
    kept = rank > last
    ties = (rank == last).nonzero().squeeze(1)
    kept[ties[: count - int(kept.sum())]] = True
    return kept.nonzero().squeeze(1)
