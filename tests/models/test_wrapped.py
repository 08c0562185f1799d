"""A wrapped model answers as the model inside, through every entry point; unsupported adapters are refused by name."""

from __future__ import annotations

import asyncio
import copy
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from families import BUILD, build
from helpers import session_logits, stock_inputs, stock_logits

import tieredkv
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import UnsupportedModelError
from tieredkv.models.wrapped import check_mode, unwrapped

pytestmark = pytest.mark.setups

QUESTION = "what is it ?"
LAYERS = ["q_proj", "k_proj", "v_proj"]


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="peft is not installed: pip install 'tieredkv[dev]'")


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (7, 56, 56, 3), dtype=np.uint8)


def adapted(model, config):
    """A copy of the model under an adapter that changes its answers."""
    from peft import get_peft_model

    wrapped = get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.2)
    return wrapped.eval()


@pytest.mark.parametrize("name", BUILD)
def test_a_peft_model_of_every_family_has_the_logits_of_stock(peft, film, name):
    model, processor = build(name)
    towers = ".*_tower.*" if name == "gemma4" else None  # whose linear layers are of a class that peft does not know
    wrapped = adapted(model, peft.LoraConfig(r=2, target_modules=LAYERS, exclude_modules=towers))
    inputs = stock_inputs(processor, film, QUESTION)
    expected = stock_logits(wrapped, inputs, 3)
    assert (expected[0] - stock_logits(model, inputs, 1)[0]).abs().max() > 0.01, "the adapter changes nothing"
    options = {"processor": processor, "fps": 4, "gpu_kv_gb": 1, "positions": "stock"}
    with tieredkv.open_session(wrapped, film, **options) as session:
        torch.testing.assert_close(session_logits(session, QUESTION, 3), expected, rtol=1e-4, atol=2e-3)


def methods(peft):
    return {
        "dora": peft.LoraConfig(r=2, target_modules=LAYERS, use_dora=True),
        "whole modules": peft.LoraConfig(r=2, target_modules=LAYERS, modules_to_save=["lm_head", "embed_tokens"]),
        "some tokens": peft.LoraConfig(r=2, target_modules=LAYERS, trainable_token_indices=[1, 2]),
        "embeddings and the vision tower": peft.LoraConfig(r=2, target_modules=["embed_tokens", "qkv"]),
        "ia3": peft.IA3Config(target_modules=LAYERS, feedforward_modules=[]),
        "loha": peft.LoHaConfig(r=2, target_modules=LAYERS),
    }


@pytest.mark.parametrize(
    "method", ["dora", "whole modules", "some tokens", "embeddings and the vision tower", "ia3", "loha"]
)
def test_sessions_answer_save_and_load_under_every_kind_of_adapter(peft, film, tmp_path, method):
    model, processor = build("qwen2_5_vl")
    wrapped = adapted(model, methods(peft)[method])
    options = {"processor": processor, "fps": 4, "gpu_kv_gb": 1, "positions": "stock"}
    inputs = stock_inputs(processor, film, QUESTION)
    expected = wrapped.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    with tieredkv.open_session(wrapped, film, **options) as session:
        assert session.ask(QUESTION, max_new_tokens=3).token_ids == expected
        session.save(tmp_path / "s.tkv")
    with tieredkv.load_session(tmp_path / "s.tkv", wrapped, processor=processor) as session:
        assert session.ask(QUESTION, max_new_tokens=3).token_ids == expected


def refused(peft):
    return {
        "PROMPT_TUNING": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "aLoRA": peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=LAYERS, alora_invocation_tokens=[3, 4]),
    }


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "aLoRA"])
def test_adapters_that_do_not_work_in_the_layers_are_refused_by_name(peft, film, kind):
    model, processor = build("qwen2_5_vl")
    wrapped = adapted(model, refused(peft)[kind])
    ways = (
        lambda: tieredkv.generate(wrapped, film, QUESTION, processor=processor),
        lambda: tieredkv.plan(wrapped, 100),
        lambda: tieredkv.use_attention(wrapped).__enter__(),
    )
    for way in ways:
        with pytest.raises(UnsupportedModelError, match=f"'default' is of type {kind}"):
            way()


def test_every_entry_point_takes_a_peft_model(peft, film, tmp_path):
    model, processor = build("qwen2_5_vl")
    wrapped = adapted(model, peft.LoraConfig(r=2, target_modules=LAYERS))
    inside = wrapped.get_base_model()
    options = {"processor": processor, "fps": 4, "gpu_kv_gb": 1}
    arguments = {**options, "max_new_tokens": 3}
    expected = tieredkv.generate(inside, film, QUESTION, **arguments).token_ids
    assert tieredkv.generate(wrapped, film, QUESTION, **arguments).token_ids == expected
    assert asyncio.run(tieredkv.agenerate(wrapped, film, QUESTION, **arguments)).token_ids == expected
    with tieredkv.open_session(inside, film, **options) as session:
        session.save(tmp_path / "s.tkv")
    with tieredkv.load_session(tmp_path / "s.tkv", wrapped, processor=processor) as session:
        assert session.ask(QUESTION, max_new_tokens=3).token_ids == expected
    assert tieredkv.plan(wrapped, film, **options).decode == tieredkv.plan(inside, film, **options).decode


def test_a_text_peft_model_generates_with_a_tiered_cache(peft, llama, prompt_ids):
    wrapped = adapted(llama, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=LAYERS))
    expected = wrapped.generate(input_ids=prompt_ids, max_new_tokens=4, do_sample=False)
    with tieredkv.TieredCache(wrapped.config, gpu_kv_gb=1) as cache, ExitStack() as later:
        with tieredkv.use_attention(wrapped):  # overlapping blocks treat a wrapper and the model inside as one
            later.enter_context(tieredkv.use_attention(wrapped.get_base_model()))
        output = wrapped.generate(input_ids=prompt_ids, max_new_tokens=4, do_sample=False, **cache_argument(cache))
    assert torch.equal(output, expected)
    assert llama.config._attn_implementation != "tieredkv"


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel], ids=["compiled", "DataParallel"])
def test_torchs_own_wrappers_answer_as_the_model_inside(film, wrap):
    model, processor = build("qwen2_5_vl")
    arguments = {"processor": processor, "fps": 4, "gpu_kv_gb": 1, "max_new_tokens": 3}
    assert unwrapped(wrap(model)) is model
    got = tieredkv.generate(wrap(model), film, QUESTION, **arguments).token_ids
    assert got == tieredkv.generate(model, film, QUESTION, **arguments).token_ids


def test_a_wrapper_around_another_module_is_refused_by_its_type(film):
    with pytest.raises(UnsupportedModelError, match="model is a Linear: give a transformers model"):
        tieredkv.open_session(torch.nn.DataParallel(torch.nn.Linear(1, 1)), film)


def test_training_mode_is_refused_only_with_dropout(peft, film):
    model, processor = build("qwen2_5_vl")
    options = {"processor": processor, "fps": 4, "gpu_kv_gb": 1}
    wrapped = adapted(model, peft.LoraConfig(r=2, target_modules=LAYERS, lora_dropout=0.1)).train()
    with pytest.raises(UnsupportedModelError, match=r"training mode, with random dropout .*call model\.eval\(\) first"):
        tieredkv.open_session(wrapped, film, **options)
    tieredkv.open_session(wrapped.eval(), film, **options).close()
    tieredkv.open_session(copy.deepcopy(model).train(), film, **options).close()


RATES = {
    "attention of Qwen's vision tower": ("qwen2_5_vl", "VisionAttention", "attention_dropout"),
    "attention of Qwen's text": ("qwen2_5_vl", "VLAttention", "attention_dropout"),
    "attention of SigLIP": ("llava_onevision", "SiglipAttention", "dropout"),
    "attention of InternViT": ("internvl", "InternVLVisionAttention", "attention_dropout"),
    "whole layers": ("llava_onevision", "SiglipEncoder", "layerdrop"),
}


@pytest.mark.parametrize(("family", "kind", "rate"), RATES.values(), ids=RATES)
def test_dropout_in_functions_is_refused_in_training_mode(family, kind, rate):
    model = copy.deepcopy(build(family)[0]).train()
    check_mode(model)
    setattr(next(module for module in model.modules() if type(module).__name__.endswith(kind)), rate, 0.1)
    with pytest.raises(UnsupportedModelError, match="training mode, with random dropout"):
        check_mode(model)
    check_mode(model.eval())


def test_dropout_of_ranks_is_refused_in_training_mode(peft):
    model = build("qwen2_5_vl")[0]
    inside = adapted(model, peft.LoHaConfig(r=2, target_modules=LAYERS, rank_dropout=0.1)).get_base_model()
    check_mode(inside)
    with pytest.raises(UnsupportedModelError, match="training mode, with random dropout"):
        check_mode(inside.train())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("always", [False, True])
def test_an_adapter_that_draws_random_numbers_is_refused_while_it_does(peft, always, training):
    config = peft.PveraConfig(r=2, target_modules=["q_proj"], sample_at_inference=always)
    wrapped = adapted(build("qwen2_5_vl")[0], config)
    inside = wrapped.get_base_model().train(training)
    if always or training:
        with pytest.raises(UnsupportedModelError, match="samples at inference" if always else "training mode"):
            check_mode(inside)
    else:
        check_mode(inside)
    with wrapped.disable_adapter():
        check_mode(inside)


def test_gradient_checkpointing_in_training_mode_is_refused(film):
    model, processor = build("qwen2_5_vl")
    model = copy.deepcopy(model).train()
    name = "activation_checkpointing_enable"  # of transformers 5.24
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    with pytest.raises(UnsupportedModelError, match="training mode, with gradient checkpointing"):
        tieredkv.open_session(model, film, processor=processor, fps=4)
    tieredkv.open_session(model.eval(), film, processor=processor, fps=4).close()
