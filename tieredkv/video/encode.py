"""The vision tower over a video, segment by segment; features wait in host memory."""

from __future__ import annotations

import math
from typing import Any

import torch

from tieredkv.models.base import EncodedVideo, VideoFamily
from tieredkv.video.frames import Progress

SEGMENT_FRAMES = 32
"""Frames per call of the vision tower: one call over a long video is the first thing that runs out of memory."""


@torch.no_grad()
def encode_video(
    family: VideoFamily, model: Any, inputs: dict[str, torch.Tensor], fps: float, progress: Progress | None = None
) -> EncodedVideo:
    """Visual tokens of preprocessed frames sampled at `fps`, equal to encoding them all at once."""
    grid = family.grid(model, inputs)
    total = math.prod(grid)
    parts: list[torch.Tensor] = []
    done = 0
    for part in family.encode_segments(model, inputs, SEGMENT_FRAMES):
        parts.append(part.cpu())
        done += part.shape[0]
        if progress is not None:
            progress(done, total)
    if done != total:
        raise RuntimeError(f"the vision tower made {done} tokens for a grid of {grid}")
    return EncodedVideo(torch.cat(parts), grid, family.seconds_per_step(model, fps))
