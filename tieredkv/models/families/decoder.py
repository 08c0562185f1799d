"""Decoder: what the cache and the planner ask about a text model, with answers for models built like Llama."""

from __future__ import annotations

from collections.abc import Sequence
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
    attention_norm: str = "input_layernorm"
    """In its layers, the module that normalises what attention reads."""
    mlp_norm: str | None = "post_attention_layernorm"
    """The module that the residual stream enters after attention. None: queries are not predicted (`models.sight`)."""
    query_norm: str = "q_norm"
    """In its attention, the module that normalises each head's query, if there is one."""
    neighbours: bool = False
    """Whether a rotation turns neighbouring dimensions together, not those half a head apart."""

    def layer_types(self, text: PreTrainedConfig) -> list[str]:
        """The type of each layer that has a cache. Raises `UnsupportedModelError` for types that are not supported."""
        from transformers.cache_utils import get_layer_types_and_kwargs

        kinds, _ = get_layer_types_and_kwargs(text)
        return self.checked(text, kinds, causal=not getattr(text, "use_bidirectional_attention", False))

    def checked(self, text: PreTrainedConfig, kinds: Sequence[str], causal: bool) -> list[str]:
        """These types of layers, if they are supported. causal: whether no token sees all later ones."""
        supported = (TIERED, *self.untiered)
        if other := sorted(set(kinds) - set(supported)):
            raise UnsupportedModelError(
                f"{text.model_type} has layers of type {', '.join(other)}; TieredCache supports only "
                f"{', '.join(supported)} in such a model."
            )
        if TIERED not in kinds or not causal:
            raise UnsupportedModelError(f"this {text.model_type} has no cache that grows: it needs no tiers.")
        return list(kinds)

    def kv_dims(self, text: PreTrainedConfig, kind: str) -> tuple[int, int]:
        """KV heads and head dim of the layers of this type of attention. Raises as `count`, and if they differ."""
        layers = zip(self.layer_types(text), text.per_layer_config, strict=False)  # the last may have no cache
        dims = list(dict.fromkeys(_dims(layer) for own, layer in layers if own == kind))
        if len(dims) > 1:
            sizes = " and ".join(f"{kv_heads} KV heads of {head_dim}" for kv_heads, head_dim in dims)
            raise UnsupportedModelError(
                f"this {text.model_type} has layers of type {kind} with {sizes}: all must be of one size."
            )
        return dims[0]

    def readers(self, text: PreTrainedConfig) -> int:
        """How many later layers attend to the keys and values of the last layer of type `TIERED`, as they have none."""
        return 0

    def read_from(self, text: PreTrainedConfig) -> int | None:
        """The first of the model's layers whose keys and values others attend to; None if there are none."""
        return None

    def window(self, text: PreTrainedConfig) -> int | None:
        """Tokens that layers of type `TIERED` see, in a config that states a window for them. None: all tokens."""
        return None

    def predicted(self, text: PreTrainedConfig) -> list[int]:
        """The places, among the model's layers, of those of type `TIERED` whose query is predicted (`models.sight`):
        not where no layer before has its positions, nor where others read its keys and values."""
        if self.mlp_norm is None:
            return []
        kinds = self.layer_types(text)
        first = next(place for place, kind in enumerate(kinds) if kind != "sliding_attention")
        tiered = [place for place, kind in enumerate(kinds) if kind == TIERED]
        return [place for place in (tiered[:-1] if self.readers(text) else tiered) if place > first]

    def query(self, attention: torch.nn.Module, normed: torch.Tensor) -> torch.Tensor:
        """Queries `(n, H, D)` before rotation, of an attention module that reads `normed` `(n, W)`."""
        query = attention.q_proj(normed).view(len(normed), -1, attention.head_dim)  # type: ignore[operator,union-attr]
        norm = getattr(attention, self.query_norm, None)
        return query if norm is None else norm(query)

    def rotated(self, query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Queries `(n, H, D)` at positions of which `cos` and `sin` are `(n, d)`: the first d dimensions turn."""
        turned, rest = query[..., : cos.shape[-1]], query[..., cos.shape[-1] :]
        if self.neighbours:
            across = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
        else:
            first, second = turned.chunk(2, -1)
            across = torch.cat((-second, first), -1)
        turned = turned * cos.unsqueeze(1) + across * sin.unsqueeze(1)
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned

    def state_bytes(self, text: PreTrainedConfig, kind: str, dtype: torch.dtype) -> tuple[int, int]:
        """The convolution state and the recurrent state of a layer of this type, which has one of each or only the
        first. Raises as `count`."""
        raise NotImplementedError(f"the decoder of {text.model_type} does not state the size of {kind}")


def _dims(layer: PreTrainedConfig) -> tuple[int, int]:
    """KV heads and head dim of one layer. layer: its config."""
    heads = count(layer, "num_attention_heads")
    kv_heads = heads if layer.num_key_value_heads is None else count(layer, "num_key_value_heads")
    return kv_heads, getattr(layer, "head_dim", None) or count(layer, "hidden_size") // heads


def count(text: PreTrainedConfig, name: str) -> int:
    """A field of a config that is a number of at least one. Raises `UnsupportedModelError` if it is anything else."""
    value = getattr(text, name, None)
    if not isinstance(value, int) or value < 1:
        raise UnsupportedModelError(f"the model's config is damaged: {name} is {value!r}.")
    return value


def sliding_window(text: PreTrainedConfig) -> int:
    """Tokens that a query sees in a layer with a window, its own included. Raises as `count`, and for one token."""
    window = count(text, "sliding_window")
    if window == 1:
        raise UnsupportedModelError(
            f"this {text.model_type} has a sliding window of one token, which is not supported: transformers' own "
            "cache then keeps all tokens."
        )
    return window
