"""Qwen3.5, dense and with experts: prompts and positions of Qwen3-VL, without its features for deeper layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tieredkv.memory.units import FLOAT32
from tieredkv.models.families.decoder import Decoder, count
from tieredkv.models.families.qwen2_vl import Qwen2VL
from tieredkv.models.families.qwen3_vl import Qwen3VL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Qwen35(Qwen3VL):
    """Adapter for `Qwen3_5ForConditionalGeneration` and `Qwen3_5MoeForConditionalGeneration`."""

    model_types: tuple[str, ...] = ("qwen3_5", "qwen3_5_moe")
    vision_settings: tuple[str, ...] = ()

    def encode(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return Qwen2VL.encode(self, model, inputs)


@dataclass(frozen=True)
class Qwen35Decoder(Decoder):
    """Text models of which most layers are linear attention by the gated delta rule."""

    untiered: tuple[str, ...] = ("linear_attention",)
    packages: tuple[str, ...] = ("flash-linear-attention", "causal-conv1d")

    def query(self, attention: torch.nn.Module, normed: torch.Tensor) -> torch.Tensor:
        """Each head's projection is followed by its gate's."""
        both = attention.q_proj(normed).view(len(normed), -1, 2, attention.head_dim)  # type: ignore[operator,union-attr]
        return attention.q_norm(both[:, :, 0])  # type: ignore[operator,no-any-return]

    def state_bytes(self, text: PreTrainedConfig, kind: str, dtype: torch.dtype) -> tuple[int, int]:
        """As transformers' gated delta rule allocates them: the recurrent state in float32."""
        key_heads, value_heads = count(text, "linear_num_key_heads"), count(text, "linear_num_value_heads")
        key_dim, value_dim = count(text, "linear_key_head_dim"), count(text, "linear_value_head_dim")
        channels = 2 * key_heads * key_dim + value_heads * value_dim
        conv = channels * count(text, "linear_conv_kernel_dim") * dtype.itemsize
        return conv, value_heads * key_dim * value_dim * FLOAT32
