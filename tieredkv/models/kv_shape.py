"""KVShape: the numbers of a model that set the size of its keys and values, and of the layers that do not grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tieredkv.errors import UnsupportedModelError
from tieredkv.models.families import text_decoder
from tieredkv.models.families.decoder import TIERED, Decoder, count, sliding_window

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of keys and values that can be cached."""


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
    """Layers with a sliding window."""
    sliding_window: int = 0
    """Tokens that a query sees in such a layer, its own included."""
    sliding_token_bytes: int = 0
    """Keys and values of one token in such a layer."""
    linear_layers: int = 0
    """Layers of linear attention."""
    conv_state_bytes: int = 0
    """The convolution state of such a layer."""
    recurrent_state_bytes: int = 0
    """The recurrent state of such a layer."""
    convolutions: int = 0
    """Layers that only convolve the last tokens."""
    convolution_bytes: int = 0
    """The state of such a layer."""
    readers: int = 0
    """Layers without keys and values of their own that attend to those of the last layer of full attention."""
    hidden_size: int = 0
    """Width of the residual stream."""

    @property
    def kv_heads(self) -> int:
        """KV heads over all layers."""
        return self.num_layers * self.num_key_value_heads

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers of full attention."""
        return self.kv_heads * 2 * self.head_dim * self.itemsize


def model_shape(config: PreTrainedConfig, dtype: torch.dtype) -> KVShape:
    """From a transformers config. dtype: of keys and values. Raises `UnsupportedModelError` if that is not in `DTYPES`,
    its text is of an unsupported kind, it is damaged, or no layer sees all tokens."""
    if dtype not in DTYPES:
        names, own = (str(each).removeprefix("torch.") for each in DTYPES), str(dtype).removeprefix("torch.")
        raise UnsupportedModelError(
            f"keys and values of {own} are not supported: load the model in {', '.join(names)}."
        )
    text = config.get_text_config(decoder=True)
    decoder = text_decoder(text)
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        count(text, name)
    kinds = decoder.layer_types(text)
    kv_heads, head_dim = decoder.kv_dims(text, TIERED)
    return KVShape(
        num_layers=kinds.count(TIERED),
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        itemsize=dtype.itemsize,
        readers=decoder.readers(text),
        hidden_size=text.hidden_size,
        **_untiered_sizes(decoder, text, kinds, dtype),
    )


def _untiered_sizes(decoder: Decoder, text: PreTrainedConfig, kinds: list[str], dtype: torch.dtype) -> dict[str, int]:
    """Fields of `KVShape` on the layers that do not grow. kinds: the type of each layer."""
    sizes: dict[str, int] = {}
    if layers := kinds.count("sliding_attention"):
        kv_heads, head_dim = decoder.kv_dims(text, "sliding_attention")
        sizes |= {
            "sliding_layers": layers,
            "sliding_window": sliding_window(text),
            "sliding_token_bytes": kv_heads * 2 * head_dim * dtype.itemsize,
        }
    if layers := kinds.count("linear_attention"):
        conv, recurrent = decoder.state_bytes(text, "linear_attention", dtype)
        sizes |= {"linear_layers": layers, "conv_state_bytes": conv, "recurrent_state_bytes": recurrent}
    if layers := kinds.count("conv"):
        conv, _ = decoder.state_bytes(text, "conv", dtype)
        sizes |= {"convolutions": layers, "convolution_bytes": conv}
    return sizes
