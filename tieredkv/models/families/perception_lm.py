"""PerceptionLM: frames resized to a square, pooled two to one along both edges, with nothing written between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tieredkv.models.families.base import VideoFamily, activation_bytes
from tieredkv.models.families.per_frame import preprocess_frames, refuse_max_pixels
from tieredkv.video.frames import Sampled

PATCH = 14
"""Pixels along an edge of a patch, in the published models."""
WIDTH_RATIO = 4
"""Intermediate size over hidden size in timm's towers."""


class PerceptionLM(VideoFamily):
    """Adapter for `PerceptionLMForConditionalGeneration`. Its tower is timm's; the config does not hold its sizes."""

    model_types = ("perception_lm",)
    vision_modules = frozenset({"vision_tower", "multi_modal_projector"})
    settings = ("vision_use_cls_token", "projector_pooling_ratio")
    vision_settings = ("architecture", "model_args")

    def text_types(self) -> tuple[str, ...]:
        return ("llama",)

    def frame_grid(self, config: Any, processor: Any, sampled: Sampled) -> tuple[int, int, int]:
        """Runs the processor on a frame on torch's meta device, which stores no pixels."""
        refuse_max_pixels(config, sampled)
        empty = torch.empty((1, 3, sampled.height, sampled.width), dtype=torch.uint8, device="meta")
        size = preprocess_frames(processor, empty, sampled.fps)["pixel_values_videos"].shape[-2:]
        rows, columns = (edge // processor.patch_size // processor.pooling_ratio for edge in size)
        return sampled.frames, rows, columns

    def tower_size(self, config: Any, processor: Any, rows: int, columns: int) -> tuple[int, int]:
        edge = processor.patch_size * processor.pooling_ratio
        return rows * edge, columns * edge

    def preprocessor(
        self, config: Any, processor: Any, sampled: Sampled
    ) -> Callable[[np.ndarray], dict[str, torch.Tensor]]:
        return lambda pixels: preprocess_frames(processor, torch.from_numpy(pixels).permute(0, 3, 1, 2), sampled.fps)

    def encode(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        weight = next(model.model.vision_tower.parameters())
        pixels = inputs["pixel_values_videos"].to(weight.device, weight.dtype)
        return model.model.get_image_features(pixels, return_dict=True).pooler_output.flatten(0, 1)

    def encode_bytes(self, config: Any, grid: tuple[int, int, int]) -> int:
        vision, pool = config.vision_config, max(1, config.projector_pooling_ratio)
        hidden = vision.model_args["embed_dim"]
        patches, pixels = grid[1] * grid[2] * pool**2, 3 * PATCH**2
        return activation_bytes(patches, pixels, hidden, WIDTH_RATIO * hidden, vision.dtype)
