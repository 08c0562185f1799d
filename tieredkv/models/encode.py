"""The vision tower over a video, segment by segment: one call over a long video is the first thing that runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from tieredkv.config import TierConfig
from tieredkv.models.families.base import VideoFamily, VideoGrid

ENCODE_BYTES = 256 * 2**20
"""Activations of the vision tower aimed at per call."""
FRAME_BYTES = 64 * 2**20
"""Frames aimed at in memory, all segments that wait or are worked on together."""
LEAST_SEGMENTS = 8
"""Segments into which a short video is cut, or there would be nothing to decode while another is encoded."""
SEGMENTS_HELD = 3
"""Segments of frames in memory at once: one being filled, one waiting, one being encoded."""


def batch_tokens(family: VideoFamily, config: Any, height: int, width: int, grid: VideoGrid, tiers: TierConfig) -> int:
    """Visual tokens to encode per call of the vision tower: whole temporal steps, at least one.

    config: the model's. height, width: of the frames before they are resized. `tiers.encode_batch` decides if given.
    Otherwise as many as keep the call's activations under `ENCODE_BYTES`, the frames held under `FRAME_BYTES`, the call
    under half a prefill chunk, and leave `LEAST_SEGMENTS` calls.
    """
    per_step = grid.step_tokens
    wanted = tiers.encode_batch
    if wanted is None:
        frames = SEGMENTS_HELD * family.step_frames(config) * height * width * 3
        activations = family.encode_bytes(config, (grid.steps, grid.rows, grid.columns))
        most = min(ENCODE_BYTES // activations, FRAME_BYTES // frames, -(-grid.steps // LEAST_SEGMENTS))
        wanted = min(per_step * most, tiers.prefill_chunk // 2)
    return per_step * max(1, min(grid.steps, wanted // per_step))


def segments(frames: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Gather frames `(H, W, 3)` into segments `(size, H, W, 3)`; the last may be shorter."""
    segment: np.ndarray | None = None
    filled = 0
    for frame in frames:
        if segment is None:
            segment, filled = np.empty((size, *frame.shape), frame.dtype), 0
        segment[filled] = frame
        filled += 1
        if filled == size:
            yield segment
            segment = None
    if segment is not None:
        yield segment[:filled]


def encode(
    family: VideoFamily,
    model: Any,
    preprocess: Callable[[np.ndarray], dict[str, torch.Tensor]],
    pixels: Iterator[np.ndarray],
) -> Iterator[tuple[torch.Tensor, int]]:
    """Features `(n, width)` of each segment, on the host, and its frames; together those of the whole video at once."""
    for segment in pixels:
        with torch.no_grad():
            features = family.encode(model, preprocess(segment)).cpu()
        yield features, len(segment)
