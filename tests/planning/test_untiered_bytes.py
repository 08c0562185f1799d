"""Layers that do not grow, and their snapshot, take what is planned."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from families import build
from helpers import text_config

import tieredkv
from tieredkv.cache.question import CONTEXT, Question
from tieredkv.cache.sliding_layer import SlidingLayer
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.config import TierConfig
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import BudgetError, UnsupportedModelError
from tieredkv.memory import limits
from tieredkv.memory.units import GIB, ceil_div
from tieredkv.models import families
from tieredkv.models.families.decoder import Decoder
from tieredkv.models.kv_shape import KVShape, model_shape
from tieredkv.planning import sizes
from tieredkv.planning.admission import Request, check_memory
from tieredkv.planning.forecast import plan
from tieredkv.planning.prefill_plan import untiered_prefill_bytes

KINDS = {
    "gemma3_text": ["sliding windows"],
    "gemma4_text": ["sliding windows"],
    "qwen3_5_text": ["linear states"],
    "lfm3": ["sliding windows", "convolution states"],
    "llama": [],
}
SLIDING = KVShape(2, 4, 2, 16, 2, sliding_layers=3, sliding_window=33, sliding_token_bytes=100)
LINEAR = KVShape(2, 4, 2, 16, 2, linear_layers=3, conv_state_bytes=1000, recurrent_state_bytes=70_000)
CONVOLUTIONS = KVShape(2, 4, 2, 16, 2, convolutions=5, convolution_bytes=3000)
EVERY_KIND = pytest.mark.parametrize(
    "shape", [SLIDING, LINEAR, CONVOLUTIONS], ids=["sliding", "linear", "convolutions"]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_holds_what_is_planned(long_ids, kind, dtype):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(text_config(kind), dtype=dtype).eval()
    shape, tiers = model_shape(model.config, dtype), TierConfig(gpu_kv_gb=1)

    def snapshot(cache):
        return cache.host_bytes - sum(layer.host.nbytes for layer in cache.tiered_layers)

    with torch.no_grad(), tieredkv.use_attention(model), TieredCache(model.config, tiers) as cache:

        def forward(*lengths):
            for length in lengths:
                past = cache.get_seq_length()
                model(long_ids[:, past : past + length], **cache_argument(cache))
                planned = sizes.untiered_bytes(shape, past, length)
                assert list(planned) == KINDS[kind]
                assert cache.untiered_bytes == sum(planned.values()), (past, length)

        cache.expect(CONTEXT)
        for lengths in ((1, 20), (10,), (1, 1), (100, 3)):  # the window holds 32
            forward(*lengths)
            cache.settle()
            assert snapshot(cache) == sizes.snapshot_bytes(shape, cache.get_seq_length())
        context = cache.get_seq_length()
        for question in (9, 70):
            cache.expect(Question(prompt_tokens=context + question, max_new_tokens=2))
            forward(question, 1, 1)
            assert cache.sealed
            cache.truncate(context)
            assert snapshot(cache) == sizes.snapshot_bytes(shape, context)
        assert cache.shape == shape
        cache.reserve(context + sizes.QUESTION_ROOM)
        digest, chunks = sizes.digest_for(shape, tiers), ceil_div(context + sizes.QUESTION_ROOM, tiers.chunk_tokens)
        fitting = digest.fitted_bytes + sizes.query_moment_bytes(shape.head_dim)
        digests = shape.kv_heads * (chunks * digest.chunk_bytes + fitting)
        assert cache.host_bytes + digests == sizes.host_bytes(shape, tiers, context, 16)


def test_other_models_have_no_such_bytes():
    shape = KVShape(2, 4, 2, 16, 2)
    assert sizes.snapshot_bytes(shape, 1000) == 0
    assert sizes.untiered_bytes(shape, 1000, 1) == {}


def test_all_kinds_in_one_model():
    shape, kinds = KVShape(2, 4, 2, 16, 2, 3, 33, 100, 3, 1000, 70_000, 5, 3000), (SLIDING, LINEAR, CONVOLUTIONS)
    for past, new in ((0, 10), (20, 10), (90, 10)):
        each = [sizes.untiered_bytes(kind, past, new) for kind in kinds]
        assert sizes.untiered_bytes(shape, past, new) == each[0] | each[1] | each[2]
    assert sizes.snapshot_bytes(shape, 90) == sum(sizes.snapshot_bytes(kind, 90) for kind in kinds)


NUMBERS = {
    "llama": "num_hidden_layers num_attention_heads hidden_size num_key_value_heads",
    "gemma3_text": "sliding_window",
    "qwen3_5_text": "linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim "
    "linear_conv_kernel_dim",
    "lfm2": "conv_L_cache",
}


@pytest.mark.parametrize("value", [0, "8", [8, 8]], ids=str)
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in NUMBERS for name in NUMBERS[kind].split()])
def test_a_damaged_config_is_refused(kind, name, value):
    config = text_config(kind)
    object.__setattr__(config, name, value)  # as a file may have it; transformers checks some types
    with pytest.raises(UnsupportedModelError, match=f"damaged: {name} is {re.escape(repr(value))}"):
        model_shape(config, torch.float32)


# ---- the memory check


@EVERY_KIND
def test_the_memory_check_counts_the_snapshot(shape):
    tiers, request = TierConfig(gpu_kv_gb=0.001, host_kv_gb=1, host_kv_bits=16), Request(5000, 40, 20)
    plain = KVShape(2, 4, 2, 16, 2)
    needed = sizes.host_bytes(plain, tiers, 5000, 16) + sizes.snapshot_bytes(shape, 5000)
    check_memory(shape, tiers, request, available=needed)
    with pytest.raises(BudgetError, match="the cache of 5,000 tokens needs"):
        check_memory(shape, tiers, request, available=needed - 1)
    held = {"room": 4000, "room_bytes": 1000 + sizes.snapshot_bytes(shape, 4000)}
    grown = 5000 * shape.token_bytes - 1000
    check_memory(shape, tiers, request, "", "ask less", **held, available=grown)
    with pytest.raises(BudgetError, match="ask less"):
        check_memory(shape, tiers, request, "", "ask less", **held, available=grown - 1)


@EVERY_KIND
def test_one_memory_must_hold_the_layers_too(shape, monkeypatch):
    tiers, request = TierConfig(gpu_kv_gb=0.001, host_kv_gb=1, host_kv_bits=8), Request(5000, 40, 20)
    layers = sum(untiered_prefill_bytes(shape, tiers, 5000, 40).values())
    both = sizes.host_bytes(shape, tiers, 5000, 8) + tiers.cap_bytes + layers
    monkeypatch.setattr(limits, "available_host_bytes", lambda: both)
    check_memory(shape, tiers, request, one_memory=True)
    monkeypatch.setattr(limits, "available_host_bytes", lambda: both - 1)
    with pytest.raises(BudgetError, match="with the device tier in the same memory"):
        check_memory(shape, tiers, request, one_memory=True)


# ---- plan


@pytest.fixture
def windowed(monkeypatch):
    """Model and processor of a video family; the first layer and the last see 33 tokens."""
    from transformers import AutoModelForImageTextToText

    model, processor = build("qwen2_5_vl")
    config = type(model.config).from_dict(model.config.to_dict())
    config.text_config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    config.text_config.sliding_window, config.text_config.use_sliding_window = 33, True
    decoder = Decoder(("qwen2_5_vl_text",), untiered=("sliding_attention",))
    monkeypatch.setattr(families, "DECODERS", (decoder, *families.DECODERS))
    return AutoModelForImageTextToText.from_config(config).eval(), processor


def test_a_session_holds_what_its_plan_says(windowed, frames, monkeypatch):
    model, processor = windowed
    model.generation_config.eos_token_id = None
    held = []
    update = SlidingLayer.update

    def watched_update(layer, *args, **kwargs):
        result = update(layer, *args, **kwargs)
        held.append(2 * layer.device_bytes)
        return result

    monkeypatch.setattr(SlidingLayer, "update", watched_update)
    options = {"processor": processor, "gpu_kv_gb": 1, "fps": 4.0, "prefill_chunk": 20}
    film = frames[:60]
    with tieredkv.open_session(model, film, **options) as session:
        stats = session.ask("what colour was the star ?", max_new_tokens=5).stats
        host = session._cached.cache.host_bytes
        question = stats.prompt_tokens - session.head_tokens - session.video.tokens
    planned = plan(model, film, **options, question_tokens=question, max_new_tokens=5)
    assert planned.prompt_tokens == stats.prompt_tokens
    assert max(held) == planned.untiered_prefill["sliding windows"] == 2 * 2 * 2 * (32 + 20) * 16 * 4
    assert held[-1] == planned.untiered_decode["sliding windows"] == 2 * 2 * 2 * (32 + 1) * 16 * 4
    assert planned.snapshot_bytes == 2 * 2 * 2 * 32 * 16 * 4
    assert 0 <= planned.host_bytes - host < 0.2 * host


def test_a_plan_prints_these_layers_apart_from_the_tiers(windowed):
    model, _ = windowed
    planned = plan(model, 500, gpu_kv_gb=1, card=1000)
    tiers_only = plan(build("qwen2_5_vl")[0], 500, gpu_kv_gb=1, card=1000)
    lines = str(planned).splitlines()
    outside = lines.index("outside the cap")
    assert lines[outside - 1].startswith("  sum")
    assert lines[outside + 1].split() == ["sliding", "windows", *"258 KiB".split(), *"16.5 KiB".split()]
    assert any("16 KiB of it the snapshot" in line for line in lines)
    assert "1 tiered layers of 3 x" in lines[0]
    assert "3 layers x" in str(tiers_only)
    assert not any("outside the cap" in line or "snapshot" in line for line in str(tiers_only).splitlines())
    plain = json.loads(json.dumps(planned.as_dict()))
    assert plain["untiered_decode"] == planned.untiered_decode
    assert (plain["layers"], plain["snapshot_bytes"]) == (1, planned.snapshot_bytes)
    assert (tiers_only.snapshot_bytes, tiers_only.untiered_prefill, tiers_only.untiered_decode) == (0, {}, {})
    alone, here = tiers_only.step.time.attention, planned.step.time.attention
    assert here == pytest.approx(
        alone * planned.step_read_bytes / tiers_only.step_read_bytes
        + planned.untiered_decode["sliding windows"] / (0.8 * 1000 * 1e6)
    )


def test_a_plan_is_refused_where_the_snapshot_does_not_fit(windowed, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    model, _ = windowed
    planned = plan(model, 500, gpu_kv_gb=1)
    plan(model, 500, gpu_kv_gb=1, host_kv_gb=planned.host_bytes / GIB)
    with pytest.raises(BudgetError, match="host_kv_gb allows"):
        plan(model, 500, gpu_kv_gb=1, host_kv_gb=(planned.host_bytes - 1) / GIB)


def test_a_plan_counts_layers_that_convolve():
    config = text_config("lfm2")
    tiered = sum(kind == "full_attention" for kind in config.layer_types)
    assert f"{tiered} tiered layers of {config.num_hidden_layers} x" in str(plan(config, 500, gpu_kv_gb=1))


def test_a_config_of_which_no_model_can_be_built_is_one_sentence():
    config = text_config("llama")
    config.hidden_act = "no such function"
    with pytest.raises(UnsupportedModelError, match="cannot be built"):
        plan(config, 500, gpu_kv_gb=1)
