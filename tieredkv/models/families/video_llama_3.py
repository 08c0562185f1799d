"""VideoLLaMA3: each frame is preceded by its time; patches that hardly differ from the frame before are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tieredkv.models.families.base import Positions, VideoFamily, VideoGrid, activation_bytes
from tieredkv.models.families.qwen2_vl import Qwen2VL
from tieredkv.video.frames import Sampled

MERGE = 2
"""Patches along each edge of a visual token, in the processors that models are published with."""


class VideoLlama3(Qwen2VL):
    """Adapter for `VideoLlama3ForConditionalGeneration`.

    Videos are resized as for Qwen2-VL; frames are encoded separately, and positions have one axis. With the processor's
    `use_token_compression`, its default, only visual tokens whose pixels differ from those of the frame before reach
    the decoder, at least one per frame, so the grid of a plan is the most that a video can have.
    """

    model_types = ("video_llama_3",)
    vision_modules = frozenset({"vision_model", "projector"})
    time_form = "12.5s"

    def text_types(self) -> tuple[str, ...]:
        return ("qwen2",)

    def opening(self, processor: Any, frames: int, seconds: float, times: Sequence[float]) -> str:
        return f"Time {times[0]:.1f}s:"

    def between(self, processor: Any, step: int, times: Sequence[float]) -> str | None:
        return f",{self.opening(processor, 0, 0.0, times)}"

    def introduction(self, processor: Any, step: int, times: Sequence[float]) -> str | None:
        return self.opening(processor, 0, 0.0, times)

    def step_frames(self, config: Any) -> int:
        return 1

    def preprocessor(
        self, config: Any, processor: Any, sampled: Sampled
    ) -> Callable[[np.ndarray], dict[str, torch.Tensor]]:
        """Each segment is preprocessed after the last frame of the one before, with which its first is compared."""
        plain = super().preprocessor(config, processor, sampled)
        if not processor.video_processor.use_token_compression:
            return plain
        before = np.empty((0, sampled.height, sampled.width, 3), np.uint8)

        def preprocess(pixels: np.ndarray) -> dict[str, torch.Tensor]:
            nonlocal before
            extra = len(before)
            inputs = plain(np.concatenate((before, pixels)))
            before = pixels[-1:].copy()
            patches, tokens = (
                inputs[name].unflatten(0, (len(pixels) + extra, -1))[extra:].flatten(0, 1)
                for name in ("pixel_values_videos", "video_compression_mask")
            )
            grid = inputs["video_grid_thw"].clone()
            grid[:, 0] -= extra
            return {
                "pixel_values_videos": patches,
                "video_compression_mask": tokens,
                "video_grid_thw": grid,
                "video_merge_sizes": inputs["video_merge_sizes"],
            }

        return preprocess

    def _preprocess(self, processor: Any, video: torch.Tensor, fps: float, **options: Any) -> dict[str, torch.Tensor]:
        if "size" in options:  # the processor divides the upper limit by the number of frames
            options["size"] = {**options["size"], "longest_edge": options["size"]["longest_edge"] * len(video)}
        if video.is_meta:  # without pixels there is nothing to compare
            options["use_token_compression"] = False
        return super()._preprocess(processor, video, fps, **options)

    def _grid(self, config: Any, inputs: dict[str, torch.Tensor]) -> tuple[int, int, int]:
        (t, h, w), merge = inputs["video_grid_thw"][0].tolist(), int(inputs["video_merge_sizes"][0])
        return t, h // merge, w // merge

    def encode(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        device = next(model.model.vision_model.parameters()).device
        names = ("pixel_values_videos", "video_grid_thw", "video_merge_sizes")
        whole = model.model.get_video_features(*(inputs[name].to(device) for name in names), return_dict=True)
        return torch.cat(tuple(whole.pooler_output), dim=0)[inputs["video_compression_mask"].to(device)]

    def lengths(self, inputs: dict[str, torch.Tensor]) -> tuple[int, ...] | None:
        frames = int(inputs["video_grid_thw"][0, 0])
        return tuple(inputs["video_compression_mask"].unflatten(0, (frames, -1)).sum(1).tolist())

    def encode_bytes(self, config: Any, grid: tuple[int, int, int]) -> int:
        vision = config.vision_config
        patches, pixels = grid[1] * grid[2] * MERGE**2, vision.num_channels * vision.patch_size**2
        return activation_bytes(patches, pixels, vision.hidden_size, vision.intermediate_size, vision.dtype)

    def positions(
        self, model: Any, head: int, video: VideoGrid, begin: int, stop: int, rule: Positions
    ) -> torch.Tensor:
        return VideoFamily.positions(self, model, head, video, begin, stop, rule)
