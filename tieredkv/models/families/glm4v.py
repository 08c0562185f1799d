"""GLM-4.1V, GLM-4.5V and GLM-4.6V: each temporal step is a picture between markers, with its time as text after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tieredkv.models.families.base import Positions, Slices, activation_bytes
from tieredkv.models.families.qwen2_vl import Qwen2VL
from tieredkv.models.families.qwen3_vl import Qwen3VL


class Glm4V(Qwen3VL):
    """Adapter for `Glm4v`, `Glm46V` and `Glm4vMoeForConditionalGeneration`.

    Positions are those of Qwen3-VL. How a time is written depends on the processor, not on the model: checkpoints of
    GLM-4.6V are models of GLM-4.1V and 4.5V.
    """

    model_types = ("glm4v", "glm46v", "glm4v_moe")
    time_form = "12 seconds"
    vision_settings: tuple[str, ...] = ()

    def text_types(self) -> tuple[str, ...]:
        return ("glm4v_text", "glm4v_moe_text")

    def placeholder(self, processor: Any, rule: Positions) -> str:
        return processor.video_token

    def visual_token(self, processor: Any) -> str:
        return processor.image_token

    def opening(self, processor: Any, frames: int, seconds: float, times: Sequence[float]) -> str:
        return _around(processor, times[0])[0]

    def between(self, processor: Any, step: int, times: Sequence[float]) -> str | None:
        return _around(processor, times[0])[0]

    def introduction(self, processor: Any, step: int, times: Sequence[float]) -> str | None:
        return self.opening(processor, 0, 0.0, times)

    def after(self, processor: Any, times: Sequence[float], slices: Slices | None) -> str:
        return _around(processor, times[0])[1]

    def ending(self, processor: Any) -> str:
        return ""

    def encode(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return Qwen2VL.encode(self, model, inputs)

    def _features(self, model: Any, inputs: dict[str, torch.Tensor]) -> Any:
        """With the places of patches in float32: from whole numbers transformers computes in torch's default dtype."""
        tower, grid = model.model.visual, inputs["video_grid_thw"]
        device = next(tower.parameters()).device
        pixels, places = inputs["pixel_values_videos"].to(device), _places(grid, tower.spatial_merge_size).to(device)
        return model.model.get_video_features(pixels, grid.to(device), return_dict=True, video_position_ids=places)

    def encode_bytes(self, config: Any, grid: tuple[int, int, int]) -> int:
        """Blocks are as wide inside as the output: `intermediate_size` is that of the merger, of a quarter as many."""
        vision = config.vision_config
        patches = grid[1] * grid[2] * vision.spatial_merge_size**2
        pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        inside = max(vision.out_hidden_size, vision.intermediate_size // vision.spatial_merge_size**2)
        return activation_bytes(patches, pixels, vision.hidden_size, inside, vision.dtype)


def _around(processor: Any, time: float) -> tuple[str, str]:
    """The processor's text before and after the visual tokens of a step that begins at `time`, in seconds."""
    before, _, after = processor.replace_frame_token_id(time, 1).partition(processor.image_token)
    return before, after


def _places(grid: torch.Tensor, merge: int) -> torch.Tensor:
    """Row and column `(patches, 2)` of each patch, float32, in the order of the tower: by merged blocks."""
    (steps, rows, columns), parts = grid[0].tolist(), []
    for axis, count in enumerate((rows, columns)):
        line = torch.arange(count, dtype=torch.float32, device="cpu")
        plane = (line.unsqueeze(1) if axis == 0 else line).expand(rows, columns)
        blocks = plane.reshape(rows // merge, merge, columns // merge, merge).transpose(1, 2)
        parts.append(blocks.flatten().repeat(steps))
    return torch.stack(parts, dim=1)
