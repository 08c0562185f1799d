"""Bytes of a model's weights, counted on torch's meta device if the model is not loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tieredkv.models import families
from tieredkv.models.meta import on_meta
from tieredkv.models.quantised import Scheme, quantised_weights, scheme_of
from tieredkv.models.weights import stored_bytes


def weight_bytes(config: Any, dtype: torch.dtype, loaded: Any = None) -> dict[str, Any]:
    """Fields of `MemoryPlan`: bytes of the decoder and of the vision tower, what a step reads of them, and how they are
    quantised. loaded: the model, if there is one."""
    scheme = scheme_of(config)
    model = on_meta(config, dtype) if loaded is None else loaded
    sizes = dict(_stored(model) if loaded is not None else _planned(model, scheme))
    family = families.VIDEO_FAMILIES.get(config.model_type)
    modules = frozenset() if family is None else family.vision_modules
    text = config.get_text_config(decoder=True)
    tables = set(_tables(model))
    vision = decoder = 0
    step = 0.0
    for name, size in sizes.items():
        if modules.intersection(name.split(".")):
            vision += size
            continue
        decoder += size
        if name not in tables:  # of which a step reads one row
            step += size * (_expert_share(text) if ".experts." in name else 1)
    known = scheme is None or scheme.matrix_bytes is not None or loaded is not None
    quantisation = None if scheme is None else scheme.name if known else f"{scheme.name}, counted as unquantised"
    return {
        "decoder_bytes": decoder,
        "vision_bytes": vision,
        "step_weight_bytes": round(step),
        "quantisation": quantisation,
    }


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
