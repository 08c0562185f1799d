"""A layer's query, predicted while the layer before it computes.

The residual stream changes little from layer to layer. So the next layer's own normalisation and query projection,
applied to the stream between this layer's attention and its MLP, nearly give its query, an MLP's time before it is
known (InfiniGen, arXiv 2406.19707, predicts from the layer's input). Shapes: `n` tokens, `H` query heads, `D` head dim.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tieredkv.environment.versions import cache_name
from tieredkv.errors import UnsupportedModelError
from tieredkv.models.families import find_decoder
from tieredkv.models.families.decoder import TIERED, Decoder

Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen of a layer's query before the layer runs."""

    query: torch.Tensor
    """`(n, H, D)`, before rotation."""
    scaling: float
    rotated: Callable[[torch.Tensor], torch.Tensor]
    """Rotates queries to the positions of the tokens."""


class Foresight(Protocol):
    """What a cache does with predictions. Tiered layers are known by their index among the tiered ones."""

    def wants(self, layer: int, tokens: int) -> bool:
        """Whether a prediction for a layer is of use in a call of `tokens` tokens."""

    def foresee(self, layer: int, sight: Sight) -> None:
        """The layer's query is about to be this."""


class Watch:
    """Hooks on a model's decoder layers, which change nothing that it computes. A call of the model is watched if its
    cache has a `foresight`."""

    def __init__(self, model: Any) -> None:
        """Hooks nothing on a model whose decoder does not say what a query is computed from."""
        self._call, self._hooks = threading.local(), []
        text = model.config.get_text_config(decoder=True)
        decoder = find_decoder(text.model_type)
        if decoder is None or decoder.mlp_norm is None:
            return
        try:
            kinds = decoder.layer_types(text)
        except UnsupportedModelError:  # a cache for it says so
            return
        layers = model.get_decoder().layers
        tiered = [place for place, kind in enumerate(kinds) if kind == TIERED]
        for place, kind in enumerate(kinds):
            if kind != "sliding_attention" or place == 0:  # such a layer's rotation may be another
                hook = self._entering(first=place == 0, rotates=kind != "sliding_attention")
                self._hooks.append(layers[place].register_forward_pre_hook(hook, with_kwargs=True))
            if place + 1 in tiered:
                norm = getattr(layers[place], decoder.mlp_norm)
                hook = self._looking(decoder, layers[place + 1], tiered.index(place + 1))
                self._hooks.append(norm.register_forward_pre_hook(hook))

    def end(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _entering(self, first: bool, rotates: bool) -> Any:
        """Notes the cache and the positions of a call as it enters a layer."""
        name = cache_name()

        def hook(layer: torch.nn.Module, inputs: Any, named: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():
                return
            if first:
                self._call.foresight = getattr(named.get(name), "foresight", None)
                self._call.rotation = None
            if rotates and (rotation := named.get("position_embeddings")) is not None:
                self._call.rotation = rotation if rotation[0].shape[-2] == 1 else None  # others are never predicted

        return hook

    def _looking(self, decoder: Decoder, layer: Any, index: int) -> Any:
        """Predicts the query of `layer`, the tiered layer `index`, from the stream that enters the MLP before it."""
        norm, attention = getattr(layer, decoder.attention_norm), layer.self_attn
        weight = next(attention.parameters())

        def hook(module: torch.nn.Module, inputs: Any) -> None:
            if torch.compiler.is_compiling():
                return
            foresight: Foresight | None = getattr(self._call, "foresight", None)
            stream, rotation = inputs[0], getattr(self._call, "rotation", None)
            if foresight is None or rotation is None or stream.dim() != 3 or weight.device != stream.device:
                return  # nobody asks, or the layer is on another device or, for now, on none
            if foresight.wants(index, stream.shape[1]):
                with torch.no_grad():
                    query = decoder.query(attention, norm(stream[0]))
                    foresight.foresee(index, Sight(query, attention.scaling, rotation_of(decoder, rotation)))

        return hook


def rotation_of(decoder: Decoder, rotation: Rotation) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rotates queries as a layer that was called with these position embeddings does. Where there are several axes of
    positions, by the first: a generated token has the same position on all."""
    cos, sin = (part.reshape(-1, *part.shape[-2:])[0] for part in rotation)
    return lambda query: decoder.rotated(query, cos, sin)
