"""Models for a simulated card, whose kernels are slow in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import text_config
from transformers import LlamaForCausalLM


@pytest.fixture(scope="session")
def one_layer() -> Any:
    config = text_config("llama")
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(3)  # attention is sharp, and errors show
    return model


def restless(layers: int) -> Any:
    """A model whose steps each choose other chunks, and whose layers change the residual stream little."""
    config = text_config("llama")
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "embed_tokens")):
                weight.mul_(4)
    return model


@pytest.fixture(scope="session")
def two_layers() -> Any:
    return restless(2)


@pytest.fixture(scope="session")
def three_layers() -> Any:
    return restless(3)
