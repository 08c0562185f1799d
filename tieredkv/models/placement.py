"""Where a model's layers compute, if it is spread over several devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tieredkv.errors import UnsupportedModelError
from tieredkv.models.families import find_decoder


def layer_devices(layers: Iterable[torch.nn.Module]) -> list[torch.device]:
    """Where each layer computes, even if its weights are stored elsewhere (accelerate's offloading)."""
    places = []
    for layer in layers:
        place = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
        places.append(next(layer.parameters()).device if place is None else torch.device(place))
    return places


def check_readers(model: Any) -> None:
    """Raise `UnsupportedModelError` unless layers that attend to others' keys and values are where those are."""
    text = model.config.get_text_config(decoder=True)
    decoder = find_decoder(text.model_type)
    first = None if decoder is None else decoder.read_from(text)
    if first is None:
        return
    places = layer_devices(model.get_decoder().layers[first:])
    if others := [place for place in places if place != places[0]]:
        raise UnsupportedModelError(
            f"layers of this {text.model_type} attend to keys and values of layer {first} and later ones, and are on "
            f"{places[0]} and {others[0]}: load it on one card (device_map={{'': 0}}), in 4 bits if it is too large."
        )
