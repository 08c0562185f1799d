"""StreamingLLM: the first tokens and the last."""

from __future__ import annotations

import torch

from tieredkv.policy.base import Policy
from tieredkv.policy.prune import HeadTokens


def rank(tokens: HeadTokens) -> torch.Tensor:
    """Later tokens rank higher, the first `sinks` highest."""
    order = torch.arange(tokens.saliency.shape[0], dtype=torch.float64, device="cpu")
    order[: tokens.sinks] = float("inf")
    return order


POLICY = Policy(
    name="streaming",
    source="StreamingLLM, arXiv 2309.17453",
    summary="All heads static, the same budget for each: the first tokens (attention sinks) and the most recent ones. "
    "Ignores attention; no policy should do worse.",
    theta=0.0,
    static_weight="even",
    static_floor=1.0,
    rank=rank,
)
