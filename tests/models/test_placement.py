"""A model spread over devices: layers that share keys and values must be on one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import random_text_model

import tieredkv
from tieredkv.errors import UnsupportedModelError
from tieredkv.models.placement import check_readers, layer_devices


def spread(model, first, second, switch):
    """Give the layers' devices as accelerate does: `first` up to layer `switch`, then `second`."""
    for index, layer in enumerate(model.get_decoder().layers):
        layer._hf_hook = SimpleNamespace(execution_device=first if index < switch else second)


def test_readers_on_another_card_are_refused_by_name():
    model = random_text_model("gemma4_text")
    first = model.config.layer_types
    own = len(first) - model.config.num_kv_shared_layers
    spread(model, "cuda:0", "cuda:1", own)
    with (
        pytest.raises(UnsupportedModelError, match=r"are on cuda:0 and cuda:1: load it on one card \(device_map="),
        tieredkv.use_attention(model),
    ):
        pass
    spread(model, "cuda:0", "cuda:1", 1)
    check_readers(model)  # only layers that nobody reads are elsewhere
    spread(model, "cuda:0", "cuda:1", len(first))
    check_readers(model)


def test_models_without_readers_may_be_spread():
    model = random_text_model("llama")
    spread(model, "cuda:0", 1, 1)
    check_readers(model)
    assert layer_devices(model.get_decoder().layers)[:2] == [torch.device("cuda", 0), torch.device(1)]
