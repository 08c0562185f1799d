"""Models some of whose layers are linear attention: their states are transformers' own, and of what they have seen."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_near, pressed, random_text_model, tier_options

import tieredkv
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import OptionError, UnsupportedModelError
from tieredkv.models.kv_shape import model_shape


@pytest.fixture(scope="module")
def qwen():
    return random_text_model("qwen3_5_text")


def test_only_layers_that_grow_count(qwen):
    assert model_shape(qwen.config, torch.float32).num_layers == 2


def test_states_have_one_size_for_any_prompt(qwen, long_ids):
    with torch.no_grad(), tieredkv.use_attention(qwen), TieredCache(qwen.config, gpu_kv_gb=1) as cache:
        assert cache.untiered_bytes == 0
        sizes = []
        for part in (long_ids[:, :2], long_ids[:, 2:400], long_ids[:, 400:401]):
            qwen(part, **cache_argument(cache))
            sizes.append(cache.untiered_bytes)
    recurrent, convolution = 4 * 16 * 16 * 4, (2 * 16 + 2 * 16 + 4 * 16) * 4 * 4
    assert sizes == [6 * (recurrent + 2 * convolution)] * 3


@pytest.mark.parametrize("first", [1, 2, 3, 4, 63, 64, 65])
def test_a_prompt_continues_from_any_first_chunk(qwen, long_ids, first):
    """Shorter than the convolution, and on either side of the 64 tokens that the recurrence computes at a time."""
    stock = qwen(long_ids[:, :200]).logits.detach()
    with torch.no_grad(), tieredkv.use_attention(qwen), TieredCache(qwen.config, gpu_kv_gb=1) as cache:
        parts = long_ids[:, :200].split([first, 3, 197 - first], dim=1)
        ours = torch.cat([qwen(part, **cache_argument(cache)).logits for part in parts], dim=1)
    assert_near(ours, stock)
    assert float((ours - stock).abs().max()) < 1e-4


def test_known_tokens_in_one_call_decode_as_one_by_one(qwen, long_ids):
    stock = qwen(long_ids[:, :220]).logits[:, 200:]
    with torch.no_grad(), tieredkv.use_attention(qwen), TieredCache(qwen.config, gpu_kv_gb=1) as cache:
        qwen(long_ids[:, :200], **cache_argument(cache))
        first = qwen(long_ids[:, 200:201], **cache_argument(cache)).logits
        with cache.forced():
            rest = qwen(long_ids[:, 201:220], **cache_argument(cache)).logits
        assert cache.sealed
    assert_near(torch.cat((first, rest), dim=1), stock)


def test_a_small_cap_is_kept(qwen, long_ids):
    options = {**pressed(qwen, 900, 0.4), "chunk_tokens": 8, "text_window": 8}
    with (
        tieredkv.use_attention(qwen),
        TieredCache(qwen.config, **tier_options(**options), max_new_tokens=12, prompt_tokens=900) as cache,
    ):
        qwen.generate(long_ids, **cache_argument(cache), max_new_tokens=12, do_sample=False)
        assert 0 < cache.ledger.peak_bytes <= cache.tiers.cap_bytes
        assert cache.counters.dynamic_heads > 0


def interrupt(*arguments, **keywords):
    raise KeyboardInterrupt


@pytest.mark.parametrize("new", [1, 7])
@pytest.mark.parametrize("cut", [1, 7])
@pytest.mark.parametrize("past", [0, 60])
def test_a_call_cut_off_within_the_first_layer_changes_nothing(qwen, long_ids, monkeypatch, past, cut, new):
    """The convolution has its new tokens by then."""
    stock = qwen(long_ids[:, : past + new]).logits[:, -1]
    with torch.no_grad(), tieredkv.use_attention(qwen), TieredCache(qwen.config, gpu_kv_gb=1) as cache:
        if past:
            qwen(long_ids[:, :past], **cache_argument(cache))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(cache, "update_recurrent_state", interrupt)
            qwen(long_ids[:, 500 : 500 + cut], **cache_argument(cache))
        ours = qwen(long_ids[:, past : past + new], **cache_argument(cache)).logits[:, -1]
        assert cache.layers[0].get_seq_length() == past + new
    assert_near(ours, stock)


@pytest.mark.parametrize("broken", [1, 3, 5, 7])
def test_a_call_cut_off_between_layers_is_noticed(qwen, long_ids, broken):
    with torch.no_grad(), tieredkv.use_attention(qwen), TieredCache(qwen.config, gpu_kv_gb=1) as cache:
        qwen(long_ids[:, :20], **cache_argument(cache))
        cache.settle()
        hook = qwen.model.layers[broken].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            qwen(long_ids[:, 20:30], **cache_argument(cache))
        hook.remove()
        with pytest.raises(RuntimeError, match=r"did not run through all layers.*truncate\(20\)"):
            qwen(long_ids[:, 20:30], **cache_argument(cache))
        with pytest.raises(RuntimeError, match="did not run through all layers"):
            cache.settle()
        cache.truncate(20)
        ours = qwen(long_ids[:, 20:30], **cache_argument(cache)).logits[:, -1]
    assert_near(ours, qwen(long_ids[:, :30]).logits[:, -1])


def test_assisted_decoding_is_refused(qwen, long_ids):
    with tieredkv.use_attention(qwen), TieredCache(qwen.config, gpu_kv_gb=1) as cache:
        with pytest.raises(OptionError, match="assisted decoding"):
            cache.activate_past_recording()
        assert not cache.is_croppable


@pytest.mark.parametrize("unsupported", ["conv", "sliding_attention"])
def test_other_layers_are_refused_by_the_name_of_their_type(qwen, unsupported):
    config = copy.deepcopy(qwen.config)
    config.layer_types = [unsupported, *config.layer_types[1:]]
    config.sliding_window = 16
    with pytest.raises(
        UnsupportedModelError, match=f"layers of type {unsupported}; .*full_attention, linear_attention"
    ):
        TieredCache(config, gpu_kv_gb=1)


def test_a_model_without_a_layer_that_grows_is_refused(qwen):
    config = copy.deepcopy(qwen.config)
    config.layer_types = ["linear_attention"] * 8
    for use in (TieredCache, lambda config: model_shape(config, torch.float32)):
        with pytest.raises(UnsupportedModelError, match="this qwen3_5_text has no cache that grows: it needs no tiers"):
            use(config)


def test_layers_with_several_states_are_refused(qwen):
    config = copy.deepcopy(qwen.config)
    config.number_of_conv_states = 3
    with pytest.raises(UnsupportedModelError, match="linear_attention of this qwen3_5_text keep 3 states each"):
        TieredCache(config, gpu_kv_gb=1)


def test_a_hybrid_that_is_not_known_is_refused_with_the_types_of_its_layers():
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    with pytest.raises(
        UnsupportedModelError,
        match="'qwen3_next' with layers of type full_attention, linear_attention: `tieredkv models`",
    ):
        TieredCache(config, gpu_kv_gb=1)
