"""MixKV: keep tokens that are important and diverse, weighted by the redundancy of each head's keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tieredkv.policy.base import Policy
from tieredkv.policy.prune import HeadTokens, pool_saliency


def scaled(score: torch.Tensor) -> torch.Tensor:
    """Min-max scaled to [0, 1]; all zero where every score is the same."""
    low, high = score.min(), score.max()
    return (score - low) / (high - low).clamp(min=1e-12)


def importance(saliency: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Windowed attention plus value norm, both scaled, the second brought to the first's mean. `(n,)`."""
    attention, norm = scaled(saliency), scaled(values.float().norm(dim=-1))
    return attention + norm * attention.mean() / norm.mean().clamp(min=1e-12)


def redundancy(keys: torch.Tensor) -> torch.Tensor:
    """Mean cosine over all pairs of different keys `(n, D)`: (n * |mean unit key|^2 - 1) / (n - 1), a scalar."""
    n = keys.shape[0]
    mean = F.normalize(keys.float(), dim=-1).mean(0)
    return (n * mean.square().sum() - 1) / max(1, n - 1)


def diversity(keys: torch.Tensor) -> torch.Tensor:
    """How little each key resembles the mean unit key: -cosine. `(n,)`."""
    unit = F.normalize(keys.float(), dim=-1)
    return -(unit @ F.normalize(unit.mean(0), dim=-1))


def rank(tokens: HeadTokens) -> torch.Tensor:
    """r * diversity + (1 - r) * importance, diversity scaled and brought to importance's mean."""
    if tokens.saliency.numel() == 0:
        return tokens.saliency
    keys, values = tokens.read()
    matters = importance(pool_saliency(tokens.saliency, tokens.pool), values)
    differs = scaled(diversity(keys))
    differs = differs * matters.mean() / differs.mean().clamp(min=1e-12)
    share = redundancy(keys).clamp(0, 1)
    return share * differs + (1 - share) * matters


POLICY = Policy(
    name="mixkv",
    source="MixKV, arXiv 2510.20707",
    summary="All heads static. Each keeps the tokens that score highest in importance (attention from the last rows "
    "plus value norm) mixed with diversity (how little a key resembles the others), by the head's own redundancy, "
    "which is computed online as the mean cosine of its keys.",
    theta=0.0,
    static_weight="even",
    static_floor=1.0,
    rank=rank,
)
