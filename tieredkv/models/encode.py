"""Runs the vision tower segment by segment: one call over a long video would run out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tieredkv.config import DEFAULT_FPS, TierConfig
from tieredkv.models.families.base import VideoFamily, VideoGrid
from tieredkv.video.frames import Sampled
from tieredkv.video.sampling import Sampling

ENCODE_BYTES = 256 * 2**20
"""Target for the vision tower's activations per call."""
FRAME_BYTES = 64 * 2**20
"""Target for the frames in memory, in all segments together."""
LEAST_SEGMENTS = 8
"""Minimum number of segments, so that in a short video too one is decoded while another is encoded."""
SEGMENTS_HELD = 3
"""Segments of frames in memory at once: one being filled, one waiting, one being encoded."""


def at_processor_rate(sampling: Sampling, processor: Any) -> Sampling:
    """`sampling`, with the processor's own rate if it has none."""
    if sampling.fps is not None:
        return sampling
    return replace(sampling, fps=getattr(processor.video_processor, "fps", None) or DEFAULT_FPS)


def batch_tokens(family: VideoFamily, config: Any, sampled: Sampled, grid: VideoGrid, tiers: TierConfig) -> int:
    """Visual tokens to encode per call of the vision tower: whole temporal steps, at least one.

    config: the model's. sampled: its frames before they are resized. `tiers.encode_batch` if it is given;
    otherwise as many as keep a call's activations under `ENCODE_BYTES`, the frames in memory under `FRAME_BYTES` and
    the call under half a prefill chunk, in at least `LEAST_SEGMENTS` calls.
    """
    per_step = grid.step_tokens
    wanted = tiers.encode_batch
    if wanted is None:
        frames = SEGMENTS_HELD * family.step_frames(config) * sampled.height * sampled.width * 3
        activations = family.encode_bytes(config, (grid.steps, grid.step_tokens // grid.columns, grid.columns))
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


@dataclass(frozen=True, slots=True)
class Encoded:
    """A segment of a video after the vision tower."""

    features: torch.Tensor
    """`(n, width)`, on the host."""
    frames: int
    lengths: tuple[int, ...] | None = None
    """Features of each temporal step; None: as many in each as the grid has."""


def encode(
    family: VideoFamily,
    model: Any,
    preprocess: Callable[[np.ndarray], dict[str, torch.Tensor]],
    pixels: Iterator[np.ndarray],
) -> Iterator[Encoded]:
    """Encode each segment. Together their features are those of the whole video encoded in one call."""
    for segment in pixels:
        inputs = preprocess(segment)
        with torch.no_grad():
            features = family.encode(model, inputs).cpu()
        yield Encoded(features, len(segment), family.lengths(inputs))
