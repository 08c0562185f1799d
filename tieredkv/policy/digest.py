"""Digests: the small stand-in for a chunk's keys by which chunks are ranked.

A digest is a pair of corner vectors `(2, D)`, low then high, of a box around the chunk's keys; a chunk's score for a
query is the largest dot product the query can have with a point of the box. It takes as much memory as one token.
"""

from __future__ import annotations

import torch


def cuboid_mean(keys: torch.Tensor) -> torch.Tensor:
    """Digest `(..., 2, D)` of chunks of keys `(..., C, D)`.

    The box is centred between the per-channel extremes and reaches as far as the keys deviate from that centre on
    average (ArkVale, "cuboid-mean"): tighter than min/max, which one outlier key stretches.
    """
    centre = (keys.amin(-2) + keys.amax(-2)) / 2
    radius = (keys - centre.unsqueeze(-2)).abs().mean(-2)
    return torch.stack((centre - radius, centre + radius), dim=-2)


def digest_logits(query: torch.Tensor, digests: torch.Tensor, scaling: float) -> torch.Tensor:
    """Estimated attention logit of the best key of every chunk: `(K, G, n)`, float32.

    query `(K, G, D)`, digests `(K, n, 2, D)`. For each channel the corner with the larger product is taken
    (Quest, eq. 1): sum_d max(q_d * low_d, q_d * high_d), written as two matrix products.
    """
    query = query.float()
    low, high = digests[:, :, 0].float(), digests[:, :, 1].float()
    upper = query.clamp(min=0) @ high.transpose(1, 2)
    lower = query.clamp(max=0) @ low.transpose(1, 2)
    return upper.add_(lower).mul_(scaling)
