"""KVShape: the numbers of a model that set the size of its keys and values, and of the layers that do not grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tieredkv.errors import UnsupportedModelError
from tieredkv.memory.units import FLOAT32

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


LAYER_SIZES = {
    "sliding_attention": ("sliding_window",),
    "linear_attention": (
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
    ),
}
"""Names in a config of the numbers that set the size of other layers than those of full attention, by their type."""


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
    sliding_layers: int = 0
    """Layers with a sliding window, of as many KV heads as those of full attention."""
    sliding_window: int = 0
    """Tokens that a query sees in such a layer, its own included."""
    linear_layers: int = 0
    """Layers of linear attention."""
    conv_state_bytes: int = 0
    """The convolution state of such a layer."""
    recurrent_state_bytes: int = 0
    """The recurrent state of such a layer."""

    @property
    def kv_heads(self) -> int:
        """KV heads over all layers."""
        return self.num_layers * self.num_key_value_heads

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers of full attention."""
        return self.kv_heads * 2 * self.head_dim * self.itemsize


def model_shape(config: PreTrainedConfig, dtype: torch.dtype) -> KVShape:
    """From a transformers config. Raises `UnsupportedModelError` if it is damaged, or no layer sees all tokens."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    _check_sizes(text, "num_hidden_layers", "num_attention_heads", "hidden_size")
    kinds = list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)
    if "full_attention" not in kinds:
        raise UnsupportedModelError(f"no layer of this {config.model_type} sees all tokens: it needs no tiers.")
    full = text.per_layer_config[kinds.index("full_attention")]
    return KVShape(
        num_layers=kinds.count("full_attention"),
        num_attention_heads=heads,
        num_key_value_heads=full.num_key_value_heads or heads,
        head_dim=getattr(full, "head_dim", None) or text.hidden_size // heads,
        itemsize=dtype.itemsize,
        **_untiered_sizes(text, kinds, dtype),
    )


def _check_sizes(text: PreTrainedConfig, *names: str) -> None:
    """Raise `UnsupportedModelError` unless these are counts of at least one."""
    for name in names:
        value = getattr(text, name, None)
        if not isinstance(value, int) or value < 1:
            raise UnsupportedModelError(f"the model's config is damaged: {name} is {value!r}.")


def _untiered_sizes(text: PreTrainedConfig, kinds: list[str], dtype: torch.dtype) -> dict[str, int]:
    """Fields of `KVShape` on the layers that do not grow. kinds: the type of each layer."""
    sizes: dict[str, int] = {}
    if layers := kinds.count("sliding_attention"):
        _check_sizes(text, *LAYER_SIZES["sliding_attention"])
        sizes |= {"sliding_layers": layers, "sliding_window": text.sliding_window}
    if layers := kinds.count("linear_attention"):  # as transformers' gated delta rule allocates its states
        _check_sizes(text, *LAYER_SIZES["linear_attention"])
        key_dim, value_dim = text.linear_key_head_dim, text.linear_value_head_dim
        channels = 2 * text.linear_num_key_heads * key_dim + text.linear_num_value_heads * value_dim
        sizes |= {
            "linear_layers": layers,
            "conv_state_bytes": channels * text.linear_conv_kernel_dim * dtype.itemsize,
            "recurrent_state_bytes": text.linear_num_value_heads * key_dim * value_dim * FLOAT32,
        }
    return sizes
