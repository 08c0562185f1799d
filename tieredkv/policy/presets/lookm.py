"""LOOK-M: text outranks images, and evicted tokens are merged into kept ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tieredkv.policy.base import Policy
from tieredkv.policy.prune import HeadTokens, text_prior

BLOCK = 1024
"""Evicted tokens compared with the kept ones at a time."""


def merge(tokens: HeadTokens, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `(b, D)` of the kept tokens, each the average of itself and the evicted tokens nearest to it.

    Nearest is by cosine of keys (LOOK-M's averaged merging, with the many-to-one nearest-neighbour assignment).
    """
    keys, values = tokens.read()
    evicted = torch.ones(keys.shape[0], dtype=torch.bool, device="cpu")
    evicted[kept] = False
    gone = evicted.nonzero().squeeze(1)
    if gone.numel() == 0 or kept.numel() == 0:
        return keys[kept], values[kept]
    unit = F.normalize(keys.float(), dim=-1)
    nearest = torch.cat([(unit[part] @ unit[kept].T).argmax(-1) for part in gone.split(BLOCK)])
    count = 1 + nearest.bincount(minlength=kept.numel()).float()
    merged = []
    for states in (keys, values):
        total = states[kept].float().index_add_(0, nearest, states[gone].float())
        merged.append((total / count.unsqueeze(1)).to(states.dtype))
    return merged[0], merged[1]


POLICY = Policy(
    name="lookm",
    source="LOOK-M, arXiv 2406.18139",
    summary="All heads static, the same budget for each: text before images, then what the last rows attend to most. "
    "The key and value of every evicted token are averaged into the kept token whose key is most alike.",
    theta=0.0,
    static_weight="even",
    static_floor=1.0,
    rank=text_prior,
    merge=merge,
)
