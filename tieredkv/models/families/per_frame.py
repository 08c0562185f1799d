"""The bases of families that encode each frame of a video separately."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tieredkv.errors import OptionError
from tieredkv.models.families.base import VideoFamily, activation_bytes
from tieredkv.video.frames import Sampled


class EachFrame(VideoFamily):
    """A temporal step is one frame, which the processor treats alike in any segment."""

    def preprocessor(
        self, config: Any, processor: Any, sampled: Sampled
    ) -> Callable[[np.ndarray], dict[str, torch.Tensor]]:
        options = self.limits(processor, sampled)

        def preprocess(pixels: np.ndarray) -> dict[str, torch.Tensor]:
            return preprocess_frames(processor, torch.from_numpy(pixels).permute(0, 3, 1, 2), sampled.fps, **options)

        return preprocess

    def limits(self, processor: Any, sampled: Sampled) -> dict[str, Any]:
        """Options with which the processor makes frames of at most `sampled.max_pixels` pixels."""
        return {}


class PerFrame(EachFrame):
    """A frame is resized to a square, which the tower turns into `side` x `side` tokens."""

    @abstractmethod
    def side(self, config: Any) -> int:
        """Rows, and columns, of a frame's tokens."""

    def frame_grid(self, config: Any, processor: Any, sampled: Sampled) -> tuple[int, int, int]:
        refuse_max_pixels(config, sampled)
        side = self.side(config)
        return sampled.frames, side, side

    def tower_size(self, config: Any, processor: Any, rows: int, columns: int) -> tuple[int, int]:
        return _pair(config.vision_config.image_size)

    def encode_bytes(self, config: Any, grid: tuple[int, int, int]) -> int:
        vision = config.vision_config
        patch, channels = _pair(vision.patch_size), vision.num_channels
        patches = math.prod(size // edge for size, edge in zip(_pair(vision.image_size), patch, strict=True))
        pixels = channels * math.prod(patch)
        return activation_bytes(patches, pixels, vision.hidden_size, vision.intermediate_size, vision.dtype)


def refuse_max_pixels(config: Any, sampled: Sampled) -> None:
    """Raise `OptionError` if a limit is given for frames that have one fixed size."""
    if sampled.max_pixels is not None:
        raise OptionError(
            f"max_pixels={sampled.max_pixels} cannot be given: frames of {config.model_type} models have one fixed "
            "size. Leave it out, and lower fps or max_frames for fewer tokens."
        )


def preprocess_frames(processor: Any, frames: torch.Tensor, fps: float, **options: Any) -> dict[str, torch.Tensor]:
    """What the processor makes of frames, uint8 `(n, 3, H, W)`, that it does not sample."""
    with torch.device("cpu"):  # whatever the caller's default device
        return processor.video_processor(
            videos=[frames],
            video_metadata=[{"fps": fps, "total_num_frames": len(frames)}],
            do_sample_frames=False,
            return_tensors="pt",
            **options,
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
