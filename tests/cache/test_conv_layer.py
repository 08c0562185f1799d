"""Models some of whose layers convolve the last few tokens: a state of fixed size, replaced by each call."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_near, pressed, random_text_model, tier_options

import tieredkv
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import OptionError
from tieredkv.models.kv_shape import model_shape


@pytest.fixture(scope="module")
def lfm2():
    return random_text_model("lfm2")


def test_only_layers_that_grow_count(lfm2):
    assert model_shape(lfm2.config, torch.float32).num_layers == 2


def test_states_have_one_size_for_any_prompt(lfm2, long_ids):
    with torch.no_grad(), tieredkv.use_attention(lfm2), TieredCache(lfm2.config, gpu_kv_gb=1) as cache:
        assert cache.untiered_bytes == 0
        sizes = []
        for part in (long_ids[:, :2], long_ids[:, 2:400], long_ids[:, 400:401]):
            lfm2(part, **cache_argument(cache))
            sizes.append(cache.untiered_bytes)
    assert sizes == [4 * 64 * 3 * 4] * 3  # layers, channels, tokens, bytes


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_a_prompt_continues_from_any_first_chunk(lfm2, long_ids, first):
    """Shorter than the convolution, as wide, and wider."""
    stock = lfm2(long_ids[:, :60]).logits.detach()
    with torch.no_grad(), tieredkv.use_attention(lfm2), TieredCache(lfm2.config, gpu_kv_gb=1) as cache:
        parts = long_ids[:, :60].split([first, 1, 2, 57 - first], dim=1)
        ours = torch.cat([lfm2(part, **cache_argument(cache)).logits for part in parts], dim=1)
    assert_near(ours, stock)
    assert float((ours - stock).abs().max()) < 1e-4


def test_known_tokens_in_one_call_decode_as_one_by_one(lfm2, long_ids):
    stock = lfm2(long_ids[:, :220]).logits[:, 200:]
    with torch.no_grad(), tieredkv.use_attention(lfm2), TieredCache(lfm2.config, gpu_kv_gb=1) as cache:
        lfm2(long_ids[:, :200], **cache_argument(cache))
        first = lfm2(long_ids[:, 200:201], **cache_argument(cache)).logits
        with cache.forced():
            rest = lfm2(long_ids[:, 201:220], **cache_argument(cache)).logits
        assert cache.sealed
    assert_near(torch.cat((first, rest), dim=1), stock)


def test_a_small_cap_is_kept(lfm2, long_ids):
    options = {**pressed(lfm2, 900, 0.4), "chunk_tokens": 8, "text_window": 8}
    with (
        tieredkv.use_attention(lfm2),
        TieredCache(lfm2.config, **tier_options(**options), max_new_tokens=12, prompt_tokens=900) as cache,
    ):
        lfm2.generate(long_ids, **cache_argument(cache), max_new_tokens=12, do_sample=False)
        assert 0 < cache.ledger.peak_bytes <= cache.tiers.cap_bytes
        assert cache.counters.dynamic_heads > 0


def interrupt(*arguments, **keywords):
    raise KeyboardInterrupt


@pytest.mark.parametrize("cut", [1, 7])
@pytest.mark.parametrize("past", [0, 60])
def test_a_call_cut_off_before_the_first_convolution_changes_nothing(lfm2, long_ids, monkeypatch, past, cut):
    stock = lfm2(long_ids[:, : past + 7]).logits[:, -1]
    with torch.no_grad(), tieredkv.use_attention(lfm2), TieredCache(lfm2.config, gpu_kv_gb=1) as cache:
        if past:
            lfm2(long_ids[:, :past], **cache_argument(cache))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(cache, "update_conv_state", interrupt)
            lfm2(long_ids[:, 500 : 500 + cut], **cache_argument(cache))
        ours = lfm2(long_ids[:, past : past + 7], **cache_argument(cache)).logits[:, -1]
        assert cache.layers[0].get_seq_length() == past + 7
    assert_near(ours, stock)


@pytest.mark.parametrize("cut", [1, 10])
@pytest.mark.parametrize("broken", [1, 2, 3, 5])
def test_a_call_cut_off_between_layers_is_noticed(lfm2, long_ids, broken, cut):
    with torch.no_grad(), tieredkv.use_attention(lfm2), TieredCache(lfm2.config, gpu_kv_gb=1) as cache:
        lfm2(long_ids[:, :20], **cache_argument(cache))
        cache.settle()
        hook = lfm2.model.layers[broken].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            lfm2(long_ids[:, 20 : 20 + cut], **cache_argument(cache))
        hook.remove()
        with pytest.raises(RuntimeError, match=r"did not run through all layers.*truncate\(20\)"):
            lfm2(long_ids[:, 20 : 20 + cut], **cache_argument(cache))
        with pytest.raises(RuntimeError, match="did not run through all layers"):
            cache.settle()
        cache.truncate(20)
        ours = lfm2(long_ids[:, 20:30], **cache_argument(cache)).logits[:, -1]
    assert_near(ours, lfm2(long_ids[:, :30]).logits[:, -1])


def test_assisted_decoding_is_refused(lfm2, long_ids):
    with torch.no_grad(), tieredkv.use_attention(lfm2), TieredCache(lfm2.config, gpu_kv_gb=1) as cache:
        lfm2(long_ids[:, :20], **cache_argument(cache))
        with pytest.raises(OptionError, match="assisted decoding"):
            cache.activate_past_recording()
        assert not cache.is_croppable
