"""LLaVA-OneVision: frames pooled two to one along both edges, one newline feature behind the last."""

from __future__ import annotations

import math
from typing import Any

import torch

from tieredkv.models.families.per_frame import PerFrame, patches_per_side


class LlavaOnevision(PerFrame):
    """Adapter for `LlavaOnevisionForConditionalGeneration`."""

    def side(self, config: Any) -> int:
        return math.ceil(patches_per_side(config.vision_config) / 2)

    def encode(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        tower = next(model.model.vision_tower.parameters())
        pixels = inputs["pixel_values_videos"].to(tower.device, model.dtype)
        features = model.model.get_video_features(
            pixels,
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            return_dict=True,
        ).pooler_output
        # Without the newline, which some versions of transformers add here: it comes once, behind the last segment.
        return features.flatten(0, 1)[: pixels.shape[1] * self.side(model.config) ** 2]

    def closing(self, model: Any) -> torch.Tensor | None:
        return model.model.image_newline.unsqueeze(0)

    def closing_tokens(self, config: Any) -> int:
        return 1
