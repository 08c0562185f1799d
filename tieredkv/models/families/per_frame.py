"""The base of families that encode each frame of a video separately, at one size."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tieredkv.models.families.base import VideoFamily, activation_bytes


class PerFrame(VideoFamily):
    """A temporal step is one frame, resized to a square, which the tower turns into `side` x `side` tokens."""

    @abstractmethod
    def side(self, config: Any) -> int:
        """Rows, and columns, of a frame's tokens."""

    def frame_grid(
        self, config: Any, processor: Any, frames: int, height: int, width: int, fps: float
    ) -> tuple[int, int, int]:
        side = self.side(config)
        return frames, side, side

    def preprocessor(
        self, config: Any, processor: Any, frames: int, height: int, width: int, fps: float
    ) -> Callable[[np.ndarray], dict[str, torch.Tensor]]:
        return lambda pixels: preprocess_frames(processor, torch.from_numpy(pixels).permute(0, 3, 1, 2), fps)

    def encode_bytes(self, config: Any, grid: tuple[int, int, int]) -> int:
        vision = config.vision_config
        patch, channels = _pair(vision.patch_size), vision.num_channels
        patches = math.prod(size // edge for size, edge in zip(_pair(vision.image_size), patch, strict=True))
        pixels = channels * math.prod(patch)
        return activation_bytes(patches, pixels, vision.hidden_size, vision.intermediate_size, vision.dtype)


def preprocess_frames(processor: Any, frames: torch.Tensor, fps: float) -> dict[str, torch.Tensor]:
    """What the processor makes of frames, uint8 `(n, 3, H, W)`, that it does not sample."""
    with torch.device("cpu"):  # whatever the caller's default device
        return processor.video_processor(
            videos=[frames],
            video_metadata=[{"fps": fps, "total_num_frames": len(frames)}],
            do_sample_frames=False,
            return_tensors="pt",
        )


def tower_features(model: Any, call: Callable[..., Any], pixels: torch.Tensor) -> torch.Tensor:
    """Features that transformers' `get_image_features` or `get_video_features` returns under the model's settings."""
    device = next(model.model.vision_tower.parameters()).device
    return call(
        pixels.to(device, model.dtype),
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        return_dict=True,
    ).pooler_output


def patches_per_side(vision: Any) -> int:
    """Patches along an edge of the square to which frames are resized. vision: the tower's config."""
    return _pair(vision.image_size)[0] // _pair(vision.patch_size)[0]


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
