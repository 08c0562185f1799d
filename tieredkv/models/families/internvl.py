"""InternVL: each frame of a video is preceded by its number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tieredkv.models.families.per_frame import PerFrame, patches_per_side, tower_features


class InternVL(PerFrame):
    """Adapter for `InternVLForConditionalGeneration`."""

    model_types = ("internvl",)
    vision_modules = frozenset({"vision_tower", "multi_modal_projector"})
    settings = ("vision_feature_layer", "vision_feature_select_strategy", "downsample_ratio", "projector_hidden_act")

    def text_types(self) -> tuple[str, ...]:
        return ("qwen2",)

    def side(self, config: Any) -> int:
        return int(patches_per_side(config.vision_config) * config.downsample_ratio)

    def visual_token(self, processor: Any) -> str:
        return processor.image_token

    def opening(self, processor: Any, frames: int, seconds: float, times: Sequence[float]) -> str:
        return self.introduction(processor, 0, times)

    def between(self, processor: Any, step: int, times: Sequence[float]) -> str | None:
        return f"{processor.end_image_token}\n{self.introduction(processor, step, times)}"

    def introduction(self, processor: Any, step: int, times: Sequence[float]) -> str:
        return f"Frame{step + 1}: {processor.start_image_token}"

    def ending(self, processor: Any) -> str:
        return processor.end_image_token

    def encode(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        pixels = inputs["pixel_values_videos"].flatten(0, 1)
        return tower_features(model, model.model.get_image_features, pixels).flatten(0, 1)
