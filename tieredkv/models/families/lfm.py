"""LFM: decoders with convolutions in most layers, and LFM3-VL, which times each temporal step as Qwen3-VL does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tieredkv.models.families.base import Positions, VideoFamily, VideoGrid
from tieredkv.models.families.decoder import Decoder, count
from tieredkv.models.families.qwen3_vl import Qwen3VL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class LfmDecoder(Decoder):
    """Text models in which most layers convolve the last few tokens."""

    untiered: tuple[str, ...] = ("conv",)
    packages: tuple[str, ...] = ("causal-conv1d",)
    settings: tuple[str, ...] = ("norm_eps", "conv_L_cache", "conv_bias")
    attention_norm: str = "operator_norm"
    mlp_norm: str | None = "ffn_norm"

    def state_bytes(self, text: PreTrainedConfig, kind: str, dtype: torch.dtype) -> tuple[int, int]:
        """No recurrent state."""
        return count(text, "hidden_size") * count(text, "conv_L_cache") * dtype.itemsize, 0


class Lfm3VL(Qwen3VL):
    """Adapter for `Lfm3VlForConditionalGeneration`. Text and video share one axis of positions."""

    model_types: tuple[str, ...] = ("lfm3_vl",)
    vision_modules = frozenset({"vision_tower", "multi_modal_projector"})
    settings: tuple[str, ...] = ("projector_hidden_act",)
    vision_settings: tuple[str, ...] = ("layer_types", "num_key_value_heads", "conv_kernel_size", "norm_eps")
    tested: tuple[str, str] = ("5.23", "5.24")

    def text_types(self) -> tuple[str, ...]:
        return ("lfm3",)

    def placeholder(self, processor: Any, rule: Positions) -> str:
        """Leaves the template's tokens around it: its authors' code is transformers'."""
        return processor.video_token

    def encode(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Exact for segments of whole temporal patches, which attention and convolutions in the tower never cross."""
        device = next(model.model.vision_tower.parameters()).device
        pixels, grid = inputs["pixel_values_videos"].to(device), inputs["video_grid_thw"].to(device)
        return torch.cat(tuple(model.model.get_video_features(pixels, grid, return_dict=True).pooler_output), dim=0)

    def positions(
        self, model: Any, head: int, video: VideoGrid, begin: int, stop: int, rule: Positions
    ) -> torch.Tensor:
        return VideoFamily.positions(self, model, head, video, begin, stop, rule)

    def decode(self, model: Any, embeddings: torch.Tensor, position_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        return VideoFamily.decode(self, model, embeddings, position_ids, cache)
