"""LLaVA-OneVision: frames pooled two to one along both edges, one newline feature after the last."""

from __future__ import annotations

import math
from typing import Any

import torch

from tieredkv.models.families.per_frame import PerFrame, patches_per_side, tower_features


class LlavaOnevision(PerFrame):
    """Adapter for `LlavaOnevisionForConditionalGeneration`."""

    model_types = ("llava_onevision",)
    vision_modules = frozenset({"vision_tower", "multi_modal_projector", "image_newline"})
    settings = ("vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act")

    def text_types(self) -> tuple[str, ...]:
        return ("qwen2",)

    def side(self, config: Any) -> int:
        return math.ceil(patches_per_side(config.vision_config) / 2)

    def encode(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        pixels = inputs["pixel_values_videos"]
        features = tower_features(model, model.model.get_video_features, pixels)
        # Without the newline, which some releases of transformers add here: it comes once, after the last segment.
        return features.flatten(0, 1)[: pixels.shape[1] * self.side(model.config) ** 2]

    def closing(self, model: Any) -> torch.Tensor | None:
        return model.model.image_newline.unsqueeze(0)

    def closing_tokens(self, config: Any) -> int:
        return 1
