"""Small random text models of every supported kind in which some layers do not grow: for `right.py`."""

from __future__ import annotations

from typing import Any

import torch

from tieredkv.models import families
from tieredkv.models.families.decoder import TIERED, Decoder

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2**16,
    "initializer_range": 0.1,  # logits of about 10, so that errors show
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
BY_LAYER: dict[str, dict[str, Any]] = {
    "sliding_attention": {"sliding_window": 128},
    "linear_attention": {
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
}
"""Sizes of layers that do not grow, by their type."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
BY_KIND: dict[str, dict[str, Any]] = {
    "gemma4_text": {"num_kv_shared_layers": 3, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 512},
    "gemma4_unified_text": {"attention_k_eq_v": True, "num_global_key_value_heads": 2},
    "lfm2_moe": {**EXPERTS, "num_dense_layers": 2},
    "qwen3_5_moe_text": {**EXPERTS, "shared_expert_intermediate_size": 64},
}
"""Further sizes, by `model_type`."""


def kinds() -> dict[str, Decoder]:
    """Supported text models with layers that do not grow, by `model_type`, as far as this transformers has them."""
    from transformers import CONFIG_MAPPING

    every = {kind: decoder for decoder in families.DECODERS if decoder.untiered for kind in decoder.model_types}
    return {kind: decoder for kind, decoder in every.items() if kind in CONFIG_MAPPING}


def make_hybrid(kind: str, decoder: Decoder, device: str) -> Any:
    """A model in float32 in which every fourth layer grows, with random weights, always the same ones."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**SIZES, **{name: size for layer in decoder.untiered for name, size in BY_LAYER.get(layer, {}).items()}}
    layers = (*decoder.untiered, *decoder.untiered, *decoder.untiered)[:3]
    config = AutoConfig.for_model(kind, **{**sizes, "layer_types": [*layers, TIERED] * 2, **BY_KIND.get(kind, {})})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("A_log"):  # recurrent states that remember hundreds of tokens
                weight.uniform_(-8, -4)
            elif name.endswith("q_norm.weight") and kind.startswith("gemma4"):  # it does not scale its dot products:
                weight.mul_(weight.numel() ** -0.5)  # with weights of 1 rounding alone decides where a head attends
    return model.to(device).eval().requires_grad_(False)
