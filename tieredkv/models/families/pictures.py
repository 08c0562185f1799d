"""Still pictures of the Qwen families: as videos of one frame, by the image processor and its limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tieredkv.models.families.base import VideoFamily
from tieredkv.models.families.qwen2_5_vl import Qwen25VL
from tieredkv.models.families.qwen2_vl import Qwen2VL
from tieredkv.models.families.qwen3_5 import Qwen35
from tieredkv.models.families.qwen3_vl import Qwen3VL
from tieredkv.video.frames import Sampled


class _Pictures(Qwen2VL):
    """What differs from a video of the same family. Nothing is written into a picture."""

    def placeholder(self, processor: Any, rule: Any) -> str:
        return processor.image_token

    def visual_token(self, processor: Any) -> str:
        return processor.image_token

    def opening(self, processor: Any, frames: int, seconds: float, times: Sequence[float]) -> str:
        return ""

    def between(self, processor: Any, step: int, times: Sequence[float]) -> str | None:
        return None

    def ending(self, processor: Any) -> str:
        return ""

    def step_frames(self, config: Any) -> int:
        """The processor repeats the picture to fill a temporal patch."""
        return 1

    def tower_size(self, config: Any, processor: Any, rows: int, columns: int) -> tuple[int, int]:
        edge = processor.image_processor.patch_size * processor.image_processor.merge_size
        return rows * edge, columns * edge

    def preprocessor(
        self, config: Any, processor: Any, sampled: Sampled
    ) -> Callable[[np.ndarray], dict[str, torch.Tensor]]:
        most = sampled.max_pixels
        options = {} if most is None else self._limiting(config, processor)(1, most)

        def preprocess(pixels: np.ndarray) -> dict[str, torch.Tensor]:
            return self._preprocess(processor, torch.from_numpy(pixels).permute(0, 3, 1, 2), sampled.fps, **options)

        return preprocess

    def _preprocess(self, processor: Any, video: torch.Tensor, fps: float, **options: Any) -> dict[str, torch.Tensor]:
        """Under the names that videos have."""
        options.pop("cap_pixels_per_frame", None)
        with torch.device("cpu"):  # whatever the caller's default device
            inputs = processor.image_processor(images=[video[0]], return_tensors="pt", **options)
        return {"pixel_values_videos": inputs["pixel_values"], "video_grid_thw": inputs["image_grid_thw"]}

    def _features(self, model: Any, inputs: dict[str, torch.Tensor]) -> Any:
        device = next(model.model.visual.parameters()).device
        pixels, grid = inputs["pixel_values_videos"].to(device), inputs["video_grid_thw"].to(device)
        return model.model.get_image_features(pixels, grid, return_dict=True)


class Qwen2VLPictures(_Pictures):
    """Of `Qwen2VL`."""


class Qwen25VLPictures(_Pictures, Qwen25VL):
    """Of `Qwen25VL`."""


class Qwen3VLPictures(_Pictures, Qwen3VL):
    """Of `Qwen3VL`. The processor writes no time before a picture."""


class Qwen35Pictures(_Pictures, Qwen35):
    """Of `Qwen35`."""


PICTURES: dict[str, VideoFamily] = {
    family.model_types[0]: family
    for family in (Qwen2VLPictures(), Qwen25VLPictures(), Qwen3VLPictures(), Qwen35Pictures())
}
"""Adapters of still pictures, by the first `model_type` of their family."""
