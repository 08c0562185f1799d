"""Bytes of a model's weights, counted on torch's meta device if the model is not loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tieredkv.models import families
from tieredkv.models.families.decoder import TIERED
from tieredkv.models.kv_shape import model_shape
from tieredkv.models.meta import on_meta
from tieredkv.models.quantised import Scheme, quantised_weights, scheme_of
from tieredkv.models.weights import stored_bytes
from tieredkv.planning.ahead_time import Lead
from tieredkv.planning.sizes import correction_bytes


@dataclass(frozen=True)
class Weights:
    """A model's weights as they are stored, counted."""

    config: Any
    dtype: torch.dtype
    """Of activations."""
    model: Any
    """On the meta device, unless it is loaded."""
    sizes: dict[str, int]
    """Bytes by name."""
    quantisation: str | None

    @staticmethod
    def of(config: Any, dtype: torch.dtype, loaded: Any = None) -> Weights:
        """loaded: the model, if there is one. Raises `UnsupportedModelError` if it cannot be built."""
        scheme = scheme_of(config)
        model = on_meta(config, dtype) if loaded is None else loaded
        sizes = dict(_stored(model) if loaded is not None else _planned(model, scheme))
        known = scheme is None or scheme.matrix_bytes is not None or loaded is not None
        quantisation = None if scheme is None else scheme.name if known else f"{scheme.name}, counted as unquantised"
        return Weights(config, dtype, model, sizes, quantisation)

    @property
    def text(self) -> Any:
        """The config of its text."""
        return self.config.get_text_config(decoder=True)

    def totals(self) -> dict[str, Any]:
        """Fields of `MemoryPlan`: bytes of the decoder and of the vision tower, what a step reads of them, and how they
        are quantised."""
        family = families.VIDEO_FAMILIES.get(self.config.model_type)
        modules = frozenset() if family is None else family.vision_modules
        tables = set(_tables(self.model))
        vision = decoder = 0
        step = 0.0
        for name, size in self.sizes.items():
            if modules.intersection(name.split(".")):
                vision += size
                continue
            decoder += size
            if name not in tables:  # of which a step reads one row
                step += self._read(name)
        return {
            "decoder_bytes": decoder,
            "vision_bytes": vision,
            "step_weight_bytes": round(step),
            "quantisation": self.quantisation,
        }

    def leads(self) -> tuple[Lead | None, ...]:
        """Of each tiered layer; None where its query is not predicted."""
        decoder = families.text_decoder(self.text)
        kinds = decoder.layer_types(self.text)
        predicted = decoder.predicted(self.text)
        correction = correction_bytes(model_shape(self.config, self.dtype))
        layers = self._by_layer(len(kinds))
        return tuple(
            _lead(layers[place - 1], layers[place], correction) if place in predicted else None
            for place, kind in enumerate(kinds)
            if kind == TIERED
        )

    def _by_layer(self, layers: int) -> list[dict[str, float]]:
        """What a step reads of each decoder layer, by name inside the layer."""
        within = self.model.get_decoder()
        prefix = next(name for name, module in self.model.named_modules() if module is within)
        prefix = f"{prefix}.layers." if prefix else "layers."
        found: list[dict[str, float]] = [{} for _ in range(layers)]
        for name in self.sizes:
            if name.startswith(prefix):
                place, _, inside = name.removeprefix(prefix).partition(".")
                if int(place) < layers:  # others are not the decoder's own
                    found[int(place)][inside] = self._read(name)
        return found

    def _read(self, name: str) -> float:
        """Bytes that a step reads of it."""
        return self.sizes[name] * (_expert_share(self.text) if ".experts." in name else 1)


def weight_bytes(config: Any, dtype: torch.dtype, loaded: Any = None) -> dict[str, Any]:
    """`Weights.totals` of a model."""
    return Weights.of(config, dtype, loaded).totals()


def _lead(before: dict[str, float], own: dict[str, float], correction: int) -> Lead:
    """before, own: what a step reads of two layers, of which the second's query is predicted, by name."""

    def of(layer: dict[str, float], attention: bool) -> Iterator[tuple[str, float]]:
        for name, nbytes in layer.items():
            module = name.split(".")[0]
            if ("attn" in module or module == "conv") is attention:
                yield name.partition(".")[2], nbytes

    mlp = sum(nbytes for _, nbytes in of(before, attention=False))
    inputs = {name: nbytes for name, nbytes in of(own, attention=True) if not name.startswith(("o_proj", "out_proj"))}
    query = sum(nbytes for name, nbytes in inputs.items() if name.startswith("q_proj"))
    return Lead(mlp + sum(inputs.values()), round(query), correction)


def _planned(model: Any, scheme: Scheme | None) -> Iterator[tuple[str, int]]:
    """Names and bytes of the parameters once they are loaded."""
    size = None if scheme is None else scheme.matrix_bytes
    quantised = frozenset() if scheme is None or size is None else frozenset(quantised_weights(model, scheme))
    for name, weight in model.named_parameters():
        if size is not None and name in quantised:
            rows, columns = weight.shape[-2:]
            yield name, weight.numel() // (rows * columns) * size(rows, columns)
        else:
            yield name, stored_bytes(weight)


def _stored(model: Any) -> Iterator[tuple[str, int]]:
    """Names and bytes of what a loaded model's weights consist of."""
    for name, weight in model.named_parameters():
        yield name, stored_bytes(weight) + sum(part.nbytes for part in _scales(weight))
    if getattr(model.config, "quantization_config", None) is not None:  # some libraries keep weights in buffers
        saved = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in saved:
                yield name, stored_bytes(buffer)


def _scales(weight: Any) -> Iterator[torch.Tensor]:
    """What bitsandbytes keeps as attributes of a weight."""
    if (scales := getattr(weight, "SCB", None)) is not None:
        yield scales
    state = getattr(weight, "quant_state", None)
    while state is not None:
        yield from (part for part in (state.absmax, state.code, state.offset) if part is not None)
        state = state.state2


def _tables(model: Any) -> Iterator[str]:
    """Names of the embedding tables, without one that is the output layer too."""
    output = model.get_output_embeddings().weight
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - {id(output)}
    return (name for name, weight in model.named_parameters() if id(weight) in tables)


def _expert_share(text: Any) -> float:
    """Share of the experts that a token is routed to."""
    chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", None)
    every = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    return chosen / every if chosen and every else 1.0
