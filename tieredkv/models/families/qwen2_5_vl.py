"""Qwen2.5-VL: as Qwen2-VL, with temporal positions by time, and window attention in the vision tower."""

from __future__ import annotations

from typing import Any

import torch

from tieredkv.models.families.base import VideoGrid
from tieredkv.models.families.qwen2_vl import Qwen2VL


class Qwen25VL(Qwen2VL):
    """Adapter for `Qwen2_5_VLForConditionalGeneration`."""

    model_types: tuple[str, ...] = ("qwen2_5_vl",)
    vision_settings: tuple[str, ...] = ("tokens_per_second", "window_size", "fullatt_block_indexes")

    def rate(self, model: Any, video: VideoGrid) -> float:
        return model.config.vision_config.tokens_per_second * video.seconds_per_step

    def _stock_times(self, video: VideoGrid) -> dict[str, Any]:
        return {"second_per_grid_ts": torch.tensor([video.seconds_per_step], dtype=torch.float32, device="cpu")}
