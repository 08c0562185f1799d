"""Digests: the small stand-in for a chunk's keys by which chunks are ranked.

A digest is `V` vectors of a chunk, on the device; V / C tokens is what it costs. `DIGESTS` names the kinds.
Shapes: `C` chunk tokens, `n` chunks, `K` KV heads, `G` query heads per KV head, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Digest:
    """One kind of digest."""

    vectors: int
    """V: vectors per chunk."""
    make: Callable[[torch.Tensor], torch.Tensor]
    """Digests `(..., V, D)` of chunks of keys `(..., C, D)`."""
    logits: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    """Estimated attention logit of every chunk's best key, `(K, G, n)` float32, from query `(K, G, D)`, digests
    `(K, n, V, D)` and the scaling."""


def mean(keys: torch.Tensor) -> torch.Tensor:
    """The mean key (the landmark of InfLLM and ReKV)."""
    return keys.mean(-2, keepdim=True)


def min_max(keys: torch.Tensor) -> torch.Tensor:
    """The box that holds all keys, low then high corner (Quest, section 3)."""
    return torch.stack((keys.amin(-2), keys.amax(-2)), dim=-2)


def cuboid_mean(keys: torch.Tensor) -> torch.Tensor:
    """A box that holds the bulk of the keys, low then high corner (ArkVale, "cuboid-mean").

    It is centred between the per-channel extremes and reaches as far as the keys deviate from that centre on average:
    tighter than min/max, which one outlier key stretches.
    """
    centre = (keys.amin(-2) + keys.amax(-2)) / 2
    radius = (keys - centre.unsqueeze(-2)).abs().mean(-2)
    return torch.stack((centre - radius, centre + radius), dim=-2)


def dot_logits(query: torch.Tensor, digests: torch.Tensor, scaling: float) -> torch.Tensor:
    """Logit of a digest that is itself a key."""
    return (query.float() @ digests[:, :, 0].float().transpose(1, 2)).mul_(scaling)


def box_logits(query: torch.Tensor, digests: torch.Tensor, scaling: float) -> torch.Tensor:
    """Largest logit that a point of the box can have.

    For each channel the corner with the larger product is taken (Quest, eq. 1): sum_d max(q_d * low_d, q_d * high_d),
    written as two matrix products.
    """
    query = query.float()
    low, high = digests[:, :, 0].float(), digests[:, :, 1].float()
    upper = query.clamp(min=0) @ high.transpose(1, 2)
    lower = query.clamp(max=0) @ low.transpose(1, 2)
    return upper.add_(lower).mul_(scaling)


DIGESTS = {
    "mean": Digest(1, mean, dot_logits),
    "minmax": Digest(2, min_max, box_logits),
    "cuboid": Digest(2, cuboid_mean, box_logits),
}
