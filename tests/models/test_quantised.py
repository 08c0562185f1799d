"""What a quantised checkpoint takes, by its config: as much as the library's own layers, where those can be created."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from families import build
from helpers import text_config
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import tieredkv
from tieredkv.errors import UnsupportedModelError
from tieredkv.models.quantised import quantised_weights, scheme_of
from tieredkv.models.weights import stored_bytes
from tieredkv.planning.weight_bytes import weight_bytes

INT8 = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}


def config_with(quantisation, kind="llama"):
    config = text_config(kind)
    config.quantization_config = quantisation
    return config


def matrix(quantisation, rows, columns):
    return scheme_of(config_with(quantisation)).matrix_bytes(rows, columns)


# ---- one matrix, against the library's own


@pytest.mark.parametrize("block", [(128, 128), None])
@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("shape", [(256, 128), (200, 300)])
def test_fp8_takes_what_transformers_allocates(shape, activations, block):
    from transformers.integrations.finegrained_fp8 import FP8Linear

    with torch.device("meta"):
        layer = FP8Linear(shape[1], shape[0], block, activations)
    want = sum(weight.nbytes for weight in layer.parameters())
    settings = {**FP8, "weight_block_size": block, "activation_scheme": activations}
    assert matrix(settings, *shape) == want


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize("shape", [(256, 128), (96, 64)])
def test_torchao_takes_what_torchao_allocates(shape, kind):
    from torchao import quantization
    from transformers import TorchAoConfig

    layer = nn.Linear(shape[1], shape[0], dtype=torch.bfloat16, device="meta", bias=False)
    settings = TorchAoConfig(getattr(quantization, kind)())
    quantization.quantize_(layer, settings.quant_type)
    assert matrix(settings, *shape) == matrix(settings.to_dict(), *shape) == stored_bytes(layer.weight)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (NF4, 2048 * 4096 // 2 + 2048 * 4096 // 64 * 4 + 64),
        (
            {**NF4, "bnb_4bit_use_double_quant": True},
            2048 * 4096 // 2 + 2048 * 64 + (2048 * 64 // 256) * 4 + 257 * 4 + 64,
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 2048 * 4096 + 2048 * 4),
        (GPTQ, 2048 * 4096 // 2 + 2048 * 32 * (2 + 0.5) + 4096 * 4),
        ({**GPTQ, "bits": 8, "group_size": -1}, 2048 * 4096 + 2048 * 3 + 4096 * 4),
        (AWQ, 2048 * 4096 // 2 + 2048 * 32 * 2.5),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, 2048 * 4096 // 2 + 2048 * 32 * 4),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": True}}
                },
            },
            2048 * 4096 // 2 + 2048 * 32 * 2,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "strategy": "channel", "symmetric": True}}},
            },
            2048 * 4096 + 2048 * 2,
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_formulas(settings, size):
    assert matrix(settings, 2048, 4096) == size


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "mxfp4"},
        {"quant_method": "fp8", "dequantize": True},
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "SomethingNewConfig"}}},
        {"quant_method": "compressed-tensors", "config_groups": {}},
    ],
    ids=str,
)
def test_what_is_not_known_is_counted_unquantised_and_says_so(settings):
    plain = weight_bytes(text_config("llama"), torch.bfloat16)
    sizes = weight_bytes(config_with(settings), torch.bfloat16)
    assert sizes["quantisation"].endswith(", counted as unquantised")
    assert {**sizes, "quantisation": None} == plain


@pytest.mark.parametrize(
    "settings",
    [
        "gptq",
        {"quant_method": "gptq"},
        {**GPTQ, "group_size": None},
        {**AWQ, "bits": "4"},
        {**AWQ, "modules_to_not_convert": ["(vision"]},
        {**FP8, "weight_block_size": 128},
        {**FP8, "modules_to_not_convert": "lm_head"},
        {"quant_method": "compressed-tensors", "config_groups": ["group_0"]},
    ],
    ids=str,
)
def test_damaged_settings_are_one_sentence(settings):
    with pytest.raises(
        UnsupportedModelError, match=r"config is damaged: its quantization_config cannot be read \(.+\)"
    ):
        tieredkv.plan(config_with(settings), 1000, gpu_kv_gb=1)


# ---- which weights


def names(quantisation, kind="llama", model=None):
    if model is None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text_config(kind))
    return set(quantised_weights(model, scheme_of(config_with(quantisation))))


def test_a_config_without_quantisation_has_no_scheme():
    assert scheme_of(text_config("llama")) is None
    assert weight_bytes(text_config("llama"), torch.bfloat16)["quantisation"] is None


def test_linear_layers_are_quantised_but_not_the_output():
    every = names(NF4)
    assert len(every) == 3 * 7
    assert "model.layers.2.mlp.down_proj.weight" in every
    assert not any("lm_head" in name or "embed" in name or "norm" in name for name in every)


def test_modules_that_a_config_keeps_are_not_counted():
    kept = names({**NF4, "llm_int8_skip_modules": ["lm_head", "model.layers.1", "down_proj"]})
    assert len(kept) == 2 * 6
    assert names({**FP8, "modules_to_not_convert": []}) == names(NF4) | {"lm_head.weight"}
    assert names({**AWQ, "modules_to_not_convert": ["q_proj"]}) == {n for n in names(NF4) if "q_proj" not in n}
    ignored = names(
        {
            "quant_method": "compressed-tensors",
            "ignore": ["lm_head", r"re:.*self_attn.*"],
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "strategy": "channel"}}},
        }
    )
    assert ignored == {n for n in names(NF4) if "self_attn" not in n}


def test_gptq_leaves_the_vision_tower_alone_and_bitsandbytes_does_not():
    model, _ = build("qwen2_5_vl")
    assert any("visual" in name for name in names(NF4, model=model))
    gptq = names(GPTQ, model=model)
    assert gptq
    assert not any("visual" in name for name in gptq)


def test_only_fp8_quantises_experts_that_are_not_linear_layers():
    model, _ = build("qwen3_5_moe")
    assert not any(".experts." in name for name in names(NF4, model=model))
    experts = {name for name in names(FP8, model=model) if ".experts." in name}
    assert {name.rsplit(".", 1)[1] for name in experts} == {"gate_up_proj", "down_proj"}
    assert len(experts) == 2 * 4


# ---- the whole model


@pytest.mark.parametrize("quantisation", [FP8, INT8], ids=["fp8", "torchao"])
def test_a_model_takes_what_transformers_replaces_its_layers_by(quantisation):
    """Of a video model; no weight is loaded."""
    config = build("qwen3_vl")[0].config
    config = type(config).from_dict(config.to_dict())
    config.quantization_config = quantisation
    sizes = weight_bytes(config, torch.bfloat16)
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    if quantisation is FP8:
        from transformers import FineGrainedFP8Config
        from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

        replace_with_fp8_linear(model, ["lm_head"], FineGrainedFP8Config())
        # Its layers are made in float32, and get the model's dtype when weights are loaded.
        total = sum(
            weight.numel() * (2 if name.endswith("bias") or weight.dtype == torch.bfloat16 else weight.itemsize)
            for name, weight in model.named_parameters()
        )
    else:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(
            model, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and name != "lm_head"
        )
        total = sum(stored_bytes(weight) for weight in model.parameters())
    assert sizes["decoder_bytes"] + sizes["vision_bytes"] == total


def test_of_a_loaded_model_scales_and_buffers_are_counted():
    """As bitsandbytes keeps scales beside a weight, and GPTQ's layers keep everything in buffers."""
    model = AutoModelForCausalLM.from_config(text_config("llama"))
    plain = weight_bytes(model.config, torch.float32, model)["decoder_bytes"]
    model.config.quantization_config = NF4
    empty = partial(torch.empty, dtype=torch.uint8, device="cpu")
    nested = SimpleNamespace(absmax=empty(10), code=empty(1000), offset=None, state2=None)
    state = SimpleNamespace(absmax=empty(200), code=empty(30), offset=empty(4), state2=nested)
    weights = model.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.down_proj.weight
    weights[0].quant_state, weights[1].SCB = state, empty(7)
    model.model.layers[1].register_buffer("qweight", empty(50_000))
    model.model.layers[1].register_buffer("scratch", empty(999), persistent=False)
    assert weight_bytes(model.config, torch.float32, model)["decoder_bytes"] == plain + 1244 + 7 + 50_000


def test_a_step_reads_the_experts_of_one_token():
    config = build("qwen3_5_moe")[0].config
    sizes = weight_bytes(config, torch.bfloat16)
    text = config.text_config
    experts = text.num_experts * 3 * text.moe_intermediate_size * text.hidden_size * 2 * text.num_hidden_layers
    table = text.vocab_size * text.hidden_size * 2
    share = text.num_experts_per_tok / text.num_experts
    assert sizes["step_weight_bytes"] == sizes["decoder_bytes"] - table - round((1 - share) * experts)
