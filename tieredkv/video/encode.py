"""The vision tower over a video, segment by segment; features wait in host memory."""

from __future__ import annotations

from typing import Any

import torch

from tieredkv.models.base import EncodedVideo, VideoFamily
from tieredkv.video.frames import Frames, Progress

SEGMENT_FRAMES = 32
"""Frames per call of the vision tower: one call over a long video is the first thing that runs out of memory."""


@torch.no_grad()
def encode_frames(
    family: VideoFamily, model: Any, processor: Any, frames: Frames, progress: Progress | None = None
) -> EncodedVideo:
    """Visual tokens of `frames`, equal to encoding them all at once."""
    inputs = family.preprocess(processor, frames.pixels, frames.fps)
    grid = family.grid(model, inputs)
    total = grid[0] * grid[1] * grid[2]
    parts: list[torch.Tensor] = []
    done = 0
    for part in family.encode_segments(model, inputs, SEGMENT_FRAMES):
        parts.append(part.cpu())
        done += part.shape[0]
        if progress is not None:
            progress(done, total)
    if done != total:
        raise RuntimeError(f"the vision tower made {done} tokens for a grid of {grid}")
    return EncodedVideo(torch.cat(parts), grid, family.seconds_per_step(model, frames.fps))
