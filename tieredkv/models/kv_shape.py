"""KVShape: the numbers of a model that set the size of its keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tieredkv.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class KVShape:
    """What the planner needs to know of a model."""

    num_layers: int
    """Layers of full attention, whose cache grows."""
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    itemsize: int
    """Bytes per element of keys and values."""

    @property
    def kv_heads(self) -> int:
        """KV heads over all layers."""
        return self.num_layers * self.num_key_value_heads

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return self.kv_heads * 2 * self.head_dim * self.itemsize


def model_shape(config: PreTrainedConfig, dtype: torch.dtype) -> KVShape:
    """From a transformers config. Raises `UnsupportedModelError` if it is damaged, or no layer sees all tokens."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        value = getattr(text, name, None)
        if not isinstance(value, int) or value < 1:
            raise UnsupportedModelError(f"the model's config is damaged: {name} is {value!r}.")
    kinds = list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)
    if "full_attention" not in kinds:
        raise UnsupportedModelError(f"no layer of this {config.model_type} sees all tokens: it needs no tiers.")
    return KVShape(
        num_layers=kinds.count("full_attention"),
        num_attention_heads=heads,
        num_key_value_heads=text.num_key_value_heads or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        itemsize=dtype.itemsize,
    )
