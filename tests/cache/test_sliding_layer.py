"""Models some of whose layers see only the last tokens: those layers stay transformers' own."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_near, pressed, random_text_model, stock_logits, tier_options

import tieredkv
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import OptionError, UnsupportedModelError
from tieredkv.models.kv_shape import model_shape


@pytest.fixture(scope="module")
def gemma():
    return random_text_model("gemma3_text")


def test_only_layers_that_grow_count(gemma):
    assert model_shape(gemma.config, torch.float32).num_layers == 2


def test_a_window_layer_holds_its_window_and_no_more(gemma, long_ids):
    with tieredkv.use_attention(gemma), TieredCache(gemma.config, gpu_kv_gb=1) as cache:
        gemma.generate(long_ids, **cache_argument(cache), max_new_tokens=3, do_sample=False)
        assert {cache.layers[index].keys.shape[2] for index in (0, 3)} == {gemma.config.sliding_window - 1}
        assert cache.get_seq_length() == long_ids.shape[1] + 2


def test_a_small_cap_is_kept(gemma, long_ids):
    options = {**pressed(gemma, 900, 0.4), "chunk_tokens": 8, "text_window": 8}
    with (
        tieredkv.use_attention(gemma),
        TieredCache(gemma.config, **tier_options(**options), max_new_tokens=12, prompt_tokens=900) as cache,
    ):
        gemma.generate(long_ids, **cache_argument(cache), max_new_tokens=12, do_sample=False)
        assert 0 < cache.ledger.peak_bytes <= cache.tiers.cap_bytes
        assert cache.counters.dynamic_heads > 0


def test_going_back_within_the_window_is_exact_and_beyond_it_refused(gemma, long_ids):
    more = torch.cat((long_ids[:, :20], long_ids[:, 40:45]), dim=1)
    stock = stock_logits(gemma, {"input_ids": more}, 1)
    with torch.no_grad(), tieredkv.use_attention(gemma), TieredCache(gemma.config, gpu_kv_gb=1) as cache:
        gemma(long_ids[:, :30], **cache_argument(cache))
        cache.crop(-10)
        out = gemma(long_ids[:, 40:45], **cache_argument(cache)).logits[:, -1]
        assert_near(out, stock)
        gemma(long_ids[:, :60], **cache_argument(cache))
        with pytest.raises(OptionError, match="sliding windows cannot go back to 80 of 85 tokens, only to 0"):
            cache.crop(-5)
        assert {layer.get_seq_length() for layer in cache.layers} == {85}  # nothing has changed


@pytest.mark.parametrize(
    "change", [{"use_bidirectional_attention": True}, {"layer_types": ["sliding_attention"] * 4}], ids=str
)
def test_models_with_nothing_to_tier_are_refused(gemma, change):
    import copy

    config = copy.deepcopy(gemma.config)
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedModelError, match="needs no tiers"):
        TieredCache(config, gpu_kv_gb=1)


def test_a_window_of_one_token_is_refused(gemma):
    """transformers' layer would keep all tokens."""
    import copy

    config = copy.deepcopy(gemma.config)
    config.sliding_window = 1
    for use in (TieredCache, lambda config: model_shape(config, torch.float32)):
        with pytest.raises(UnsupportedModelError, match="gemma3_text has a sliding window of one token"):
            use(config)


@pytest.mark.parametrize("rows", [1, 64])
def test_queries_attend_in_blocks(gemma, long_ids, rows, monkeypatch):
    stock = gemma(long_ids[:, :300]).logits
    monkeypatch.setattr("tieredkv.cache.sliding_layer.ROWS", rows)
    with torch.no_grad(), tieredkv.use_attention(gemma), TieredCache(gemma.config, gpu_kv_gb=1) as cache:
        parts = [gemma(part, **cache_argument(cache)).logits for part in long_ids[:, :300].split(130, dim=1)]
    assert_near(torch.cat(parts, dim=1), stock)


@pytest.mark.parametrize("broken", [1, 3], ids=["before the first layer that grows", "behind it"])
def test_an_interrupted_forward_is_noticed(gemma, long_ids, broken):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with torch.no_grad(), tieredkv.use_attention(gemma), TieredCache(gemma.config, gpu_kv_gb=1) as cache:
        gemma(long_ids[:, :20], **cache_argument(cache))
        hook = gemma.model.layers[broken].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            gemma(long_ids[:, 20:30], **cache_argument(cache))
        hook.remove()
        with pytest.raises(RuntimeError, match=r"did not run through all layers.*truncate\(20\)"):
            gemma(long_ids[:, 20:30], **cache_argument(cache))
        cache.truncate(20)
        got = gemma(long_ids[:, 20:30], **cache_argument(cache)).logits[:, -1]
    stock = gemma(long_ids[:, :30]).logits[:, -1]
    assert_near(got, stock)
