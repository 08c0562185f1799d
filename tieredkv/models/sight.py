"""A layer's query, predicted while the layer before it computes.

The residual stream changes little from layer to layer. So the next layer's own normalisation and query projection,
applied to the stream between this layer's attention and its MLP, nearly give its query, an MLP's time before it is
known (InfiniGen, arXiv 2406.19707, predicts from the layer's input). What that misses is noted while a context is read,
so that a correction can be fitted to it. Shapes: `n` tokens, `W` width of the stream, `H` query heads, `D` head dim.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch

from tieredkv.environment.ambient import Ambient
from tieredkv.environment.versions import cache_name
from tieredkv.errors import UnsupportedModelError
from tieredkv.models.families import find_decoder
from tieredkv.models.families.decoder import TIERED, Decoder

Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """What is seen of a layer's query before the layer runs."""

    stream: torch.Tensor
    """`(n, W)`: the residual stream."""
    norm: Callable[[torch.Tensor], torch.Tensor]
    query: Callable[[torch.Tensor], torch.Tensor]
    """The layer's own, from normalised rows to queries `(n, H, D)` before rotation."""
    scaling: float
    rotated: Callable[[torch.Tensor], torch.Tensor]
    """Rotates queries to the positions of the tokens."""
    ambient: Ambient
    """What the model runs under."""

    def predicted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised rows `(n, W)`, and the queries `(n, H, D)` that the layer would have if they were its own, before
        rotation. May be called on another thread or stream than the model's."""
        with self.ambient.here(), torch.no_grad():
            rows = self.norm(self.stream)
            return rows, self.query(rows)


class Foresight(Protocol):
    """What a cache does with predictions. Tiered layers are known by their index among the tiered ones."""

    def wants(self, layer: int, tokens: int) -> bool:
        """Whether a prediction for a layer is of use in a call of `tokens` tokens."""

    def foresee(self, layer: int, sight: Sight) -> None:
        """The layer's query is about to be this."""

    def rows(self, layer: int, tokens: int) -> int:
        """Of how many tokens of a call of `tokens` it should be noted what a prediction misses; 0: of none."""

    def learn(self, layer: int, rows: torch.Tensor, missed: torch.Tensor, tokens: int) -> None:
        """In a call of `tokens` tokens, predictions from the normalised rows `(n, W)` missed `(n, H * D)`: what is to
        be added to each query, before rotation."""


@dataclass(frozen=True, slots=True, eq=False)
class _Noted:
    """Predictions in a call of several tokens, until the true queries are known."""

    layer: int
    places: torch.Tensor
    """`(n,)`: which tokens."""
    rows: torch.Tensor
    predicted: torch.Tensor


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
        predicted = decoder.predicted(text)
        for place, kind in enumerate(kinds):
            if kind != "sliding_attention" or place == 0:  # such a layer's rotation may be another
                hook = self._entering(first=place == 0, rotates=kind != "sliding_attention")
                self._hooks.append(layers[place].register_forward_pre_hook(hook, with_kwargs=True))
            if place + 1 in predicted:
                index, norm = tiered.index(place + 1), getattr(layers[place], decoder.mlp_norm)
                self._hooks.append(norm.register_forward_pre_hook(self._looking(decoder, layers[place + 1], index)))
                hook = self._comparing(decoder, layers[place + 1], index)
                self._hooks.append(layers[place + 1].register_forward_pre_hook(hook, with_kwargs=True))

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
                foresight = getattr(named.get(name), "foresight", None)  # a reference would keep the cache's memory
                self._call.foresight = None if foresight is None else weakref.ref(foresight)
                self._call.rotation = self._call.given = self._call.noted = None
            rotation = named.get("position_embeddings") if rotates else None
            if rotation is not None and rotation is not self._call.given:
                self._call.given = rotation if rotation[0].shape[-2] == 1 else None  # others are never predicted
                self._call.rotation = self._call.given

        return hook

    def _foresight(self) -> Foresight | None:
        """Of the cache of this thread's call."""
        found = getattr(self._call, "foresight", None)
        return None if found is None else found()

    def _rotation(self, device: torch.device) -> Rotation | None:
        """This call's, on the device of a layer: it comes from the first card, and layers move it after their hooks."""
        rotation: Rotation | None = getattr(self._call, "rotation", None)
        if rotation is not None and rotation[0].device != device:
            rotation = rotation[0].to(device), rotation[1].to(device)
            self._call.rotation = rotation
        return rotation

    def _looking(self, decoder: Decoder, layer: Any, index: int) -> Any:
        """Predicts the query of `layer`, the tiered layer `index`, from the stream that enters the MLP before it."""
        norm, attention = getattr(layer, decoder.attention_norm), layer.self_attn
        query = partial(decoder.query, attention)

        def hook(module: torch.nn.Module, inputs: Any) -> None:
            if torch.compiler.is_compiling():
                return
            foresight, stream = self._foresight(), inputs[0]
            if foresight is None or stream.dim() != 3 or _device_of(attention) != stream.device:
                return  # nobody asks, or the layer is on another device or, for now, on none
            tokens = stream.shape[1]
            if foresight.wants(index, tokens) and (rotation := self._rotation(stream.device)) is not None:
                rotated = rotation_of(decoder, rotation)
                ambient = Ambient(stream=False)
                foresight.foresee(index, Sight(stream[0], norm, query, attention.scaling, rotated, ambient))
            elif count := foresight.rows(index, tokens):
                places = torch.arange(count, dtype=torch.int64, device=stream.device) * tokens // count
                with torch.no_grad():
                    rows = norm(stream[0, places])
                    self._call.noted = _Noted(index, places, rows, query(rows))

        return hook

    def _comparing(self, decoder: Decoder, layer: Any, index: int) -> Any:
        """Compares what was predicted of several tokens with the queries of `layer`, as a call enters it."""
        norm, attention = getattr(layer, decoder.attention_norm), layer.self_attn

        def hook(module: torch.nn.Module, inputs: Any, named: dict[str, Any]) -> None:
            noted: _Noted | None = getattr(self._call, "noted", None)
            if torch.compiler.is_compiling() or noted is None or noted.layer != index:
                return
            foresight = self._foresight()
            assert foresight is not None  # the call has its cache
            self._call.noted = None
            stream = inputs[0] if inputs else named["hidden_states"]
            with torch.no_grad():
                missed = decoder.query(attention, norm(stream[0, noted.places])) - noted.predicted
            foresight.learn(index, noted.rows, missed.flatten(1), stream.shape[1])

        return hook


def _device_of(attention: torch.nn.Module) -> torch.device | None:
    """Where its weights are now; None: it has none. Some quantised layers keep theirs in buffers alone."""
    weight = next(chain(attention.parameters(), attention.buffers()), None)
    return None if weight is None else weight.device


def rotation_of(decoder: Decoder, rotation: Rotation) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rotates queries as a layer that was called with these position embeddings does. Where there are several axes of
    positions, by the first: a generated token has the same position on all."""
    cos, sin = (part.reshape(-1, *part.shape[-2:])[0] for part in rotation)
    return lambda query: decoder.rotated(query, cos, sin)
