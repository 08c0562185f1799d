"""Mistral and Phi: decoders whose config has one sliding window for all layers, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tieredkv.errors import UnsupportedModelError
from tieredkv.models.families.decoder import TIERED, Decoder, count, sliding_window

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class OneWindowDecoder(Decoder):
    """Layers with a window longer than the contexts that the model is made for count as layers that see all tokens."""

    def layer_types(self, text: PreTrainedConfig) -> list[str]:
        if self.window(text) is not None:
            return [TIERED] * count(text, "num_hidden_layers")
        if getattr(text, "sliding_window", None) is not None:
            raise UnsupportedModelError(
                f"every layer of this {text.model_type} sees only the last {sliding_window(text):,} tokens: it has no "
                "cache that grows and needs no tiers."
            )
        return super().layer_types(text)

    def window(self, text: PreTrainedConfig) -> int | None:
        if getattr(text, "sliding_window", None) is None:
            return None
        window = sliding_window(text)
        return window if window >= count(text, "max_position_embeddings") else None
