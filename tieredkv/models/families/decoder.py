"""Decoder: what the cache and the planner ask about a text model, with answers for models built like Llama."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tieredkv.environment.versions import NEWEST, OLDEST
from tieredkv.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TIERED = "full_attention"
"""The type, in transformers' configs, of the layers whose cache grows with the prompt."""


@dataclass(frozen=True)
class Decoder:
    """A kind of text model. One that differs in more than these values overrides the methods, in a file of its own."""

    model_types: tuple[str, ...]
    """`model_type` of the configs of its text."""
    untiered: tuple[str, ...] = ()
    """Types of layers besides `TIERED` that it is tested with."""
    packages: tuple[str, ...] = ()
    """Packages with kernels in place of which transformers runs slow references."""
    settings: tuple[str, ...] = ()
    """Fields of the config, besides those that many decoders have, on which keys and values depend."""
    video_only: bool = False
    """Whether it is tested within a video family only."""
    tested: tuple[str, str] = (OLDEST, NEWEST)
    """The oldest and the newest transformers that it is tested with."""

    def layer_types(self, text: PreTrainedConfig) -> list[str]:
        """The type of each layer that has a cache. Raises `UnsupportedModelError` for types that are not supported."""
        from transformers.cache_utils import get_layer_types_and_kwargs

        kinds, _ = get_layer_types_and_kwargs(text)
        supported = (TIERED, *self.untiered)
        if other := sorted(set(kinds) - set(supported)):
            raise UnsupportedModelError(
                f"{text.model_type} has layers of type {', '.join(other)}; TieredCache supports only "
                f"{', '.join(supported)} in such a model."
            )
        if TIERED not in kinds or getattr(text, "use_bidirectional_attention", False):
            raise UnsupportedModelError(f"this {text.model_type} has no cache that grows: it needs no tiers.")
        return list(kinds)

    def kv_dims(self, text: PreTrainedConfig, kind: str) -> tuple[int, int]:
        """KV heads and head dim, the same in all layers of this type of attention. Raises as `count`."""
        heads = count(text, "num_attention_heads")
        kv_heads = heads if text.num_key_value_heads is None else count(text, "num_key_value_heads")
        return kv_heads, getattr(text, "head_dim", None) or count(text, "hidden_size") // heads

    def state_bytes(self, text: PreTrainedConfig, kind: str, dtype: torch.dtype) -> tuple[int, int]:
        """The convolution state and the recurrent state of a layer of this type of linear attention. Raises as
        `count`."""
        raise NotImplementedError(f"the decoder of {text.model_type} does not state the size of {kind}")


def count(text: PreTrainedConfig, name: str) -> int:
    """A field of a config that is a number of at least one. Raises `UnsupportedModelError` if it is anything else."""
    value = getattr(text, name, None)
    if not isinstance(value, int) or value < 1:
        raise UnsupportedModelError(f"the model's config is damaged: {name} is {value!r}.")
    return value
