"""What transformers asks of a cache, and what is refused rather than answered wrongly."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_near, cap_share, pressed, tier_options

import tieredkv
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import OptionError, UnsupportedModelError


def test_a_model_that_does_not_attend_through_the_cache_is_an_error(llama, prompt_ids):
    with TieredCache(llama.config, gpu_kv_gb=1) as cache, pytest.raises(RuntimeError, match="use_attention"):
        llama(prompt_ids, **cache_argument(cache))


def test_a_stock_cache_under_our_attention_is_an_error(llama, prompt_ids):
    with tieredkv.use_attention(llama), pytest.raises(RuntimeError, match="do not come from a TieredCache"):
        llama(prompt_ids)


def test_attention_is_restored_after_nested_blocks_and_errors(llama):
    before = llama.config._attn_implementation
    with pytest.raises(ZeroDivisionError), tieredkv.use_attention(llama):
        with tieredkv.use_attention(llama):
            assert llama.config._attn_implementation == "tieredkv"
        assert llama.config._attn_implementation == "tieredkv"
        raise ZeroDivisionError
    assert llama.config._attn_implementation == before


def test_the_vision_tower_keeps_its_attention(video_model):
    before = video_model.config.vision_config._attn_implementation
    with tieredkv.use_attention(video_model):
        assert video_model.config.vision_config._attn_implementation == before
        assert video_model.config.text_config._attn_implementation == "tieredkv"
    assert video_model.config.text_config._attn_implementation == before


def test_the_length_is_logical_in_both_phases(llama, prompt_ids):
    with tieredkv.use_attention(llama), torch.no_grad(), TieredCache(llama.config, gpu_kv_gb=1) as cache:
        assert cache.get_seq_length() == 0
        llama(prompt_ids, **cache_argument(cache))
        assert cache.get_seq_length() == 300
        llama(prompt_ids[:, :1], **cache_argument(cache))
        assert cache.sealed
        assert cache.get_seq_length() == 301


def test_cropping_takes_tokens_off_the_end(llama, prompt_ids):
    with tieredkv.use_attention(llama), torch.no_grad(), TieredCache(llama.config, gpu_kv_gb=1) as cache:
        want = llama(prompt_ids[:, :220], **cache_argument(cache)).logits
        cache.crop(-20)
        again = llama(prompt_ids[:, 200:220], **cache_argument(cache)).logits
        llama(prompt_ids[:, :1], **cache_argument(cache))
        cache.crop(-21)
        sealed_between = llama(prompt_ids[:, 200:220], **cache_argument(cache)).logits
    assert_near(again, want[:, 200:])
    assert_near(sealed_between, want[:, 200:])


def test_a_batch_is_refused(llama, prompt_ids):
    with (
        tieredkv.use_attention(llama),
        TieredCache(llama.config, gpu_kv_gb=1) as cache,
        pytest.raises(OptionError, match="batch of 2"),
    ):
        llama(prompt_ids.repeat(2, 1), **cache_argument(cache))


def test_padding_is_refused(llama, prompt_ids):
    mask = torch.ones_like(prompt_ids)
    mask[0, :3] = 0
    with (
        tieredkv.use_attention(llama),
        TieredCache(llama.config, gpu_kv_gb=1) as cache,
        pytest.raises(OptionError, match="padding"),
    ):
        llama(prompt_ids, attention_mask=mask, **cache_argument(cache))


def test_beam_search_is_refused(llama, prompt_ids):
    with (
        tieredkv.use_attention(llama),
        TieredCache(llama.config, gpu_kv_gb=1) as cache,
        pytest.raises(OptionError, match=r"batch of 2|beam"),
    ):
        llama.generate(prompt_ids, **cache_argument(cache), num_beams=2, max_new_tokens=3)


def test_sliding_layers_are_refused():
    from transformers import Qwen2Config

    config = Qwen2Config(use_sliding_window=True, sliding_window=16, max_window_layers=1, num_hidden_layers=3)
    with pytest.raises(UnsupportedModelError, match="sliding_attention"):
        TieredCache(config, gpu_kv_gb=1)


def test_an_untested_decoder_is_refused_by_name():
    from transformers import OlmoConfig

    with pytest.raises(UnsupportedModelError, match=r"'olmo'.*tieredkv models"):
        TieredCache(OlmoConfig(), gpu_kv_gb=1)


def test_an_unknown_tier_option_is_refused(llama):
    with pytest.raises(OptionError, match="gpu_gb"):
        TieredCache(llama.config, gpu_gb=1)


def test_under_a_small_budget_counters_say_what_was_done(llama, long_ids):
    options = {"gpu_kv_gb": cap_share(llama, 900, 0.4), "text_window": 16, "theta": 2, "reuse_above": -1.0, "stay": 1.0}
    options["pack_pages"] = False
    with (
        tieredkv.use_attention(llama),
        TieredCache(llama.config, max_new_tokens=20, **tier_options(**options)) as cache,
    ):
        out = llama.generate(long_ids, **cache_argument(cache), max_new_tokens=20, do_sample=False)
        cache.finish()
    assert out.shape[1] == 920
    assert cache.counters.dynamic_heads == 6
    assert cache.counters.selected > 0
    assert 0 < cache.counters.resident < cache.counters.selected
    assert cache.counters.prefetched_bytes > 0


@pytest.mark.parametrize("chunk", [100, 299])
def test_a_prompt_that_ends_in_a_single_token_is_prefilled_when_its_length_is_known(llama, long_ids, chunk):
    ids = long_ids[:, : 2 * chunk + 1]
    want = llama(ids).logits[:, -1]
    tiers = tieredkv.TierConfig(
        **tier_options(gpu_kv_gb=cap_share(llama, ids.shape[1], 1.0), chunk_tokens=8, text_window=16)
    )
    cache = TieredCache(llama.config, tiers, max_new_tokens=4, prompt_tokens=ids.shape[1])
    with torch.no_grad(), tieredkv.use_attention(llama), cache:
        for part in ids.split(chunk, dim=1):
            logits = llama(part, **cache_argument(cache)).logits[:, -1]
        assert not cache.sealed
        llama(ids[:, :1], **cache_argument(cache))
        assert cache.sealed
    assert_near(logits, want)


def test_prefill_is_exact_when_the_past_is_streamed_in_many_blocks(llama, long_ids):
    want = llama(long_ids).logits
    tiers = tieredkv.TierConfig(**tier_options(gpu_kv_gb=cap_share(llama, 900, 0.1), chunk_tokens=8, text_window=4))
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, tiers) as cache:
        parts = [llama(part, **cache_argument(cache)).logits for part in long_ids.split(130, dim=1)]
        assert cache.device_tier.streamed_bytes > 3 * 900 * cache.shape.token_bytes
        assert cache.ledger.peak_bytes <= cache.ledger.cap_bytes
    assert_near(torch.cat(parts, dim=1), want)


def test_an_interrupted_forward_is_noticed_and_truncating_repairs_the_cache(llama, prompt_ids, monkeypatch):
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, gpu_kv_gb=1) as cache:
        llama(prompt_ids[:, :200], **cache_argument(cache))
        with monkeypatch.context() as patch:
            patch.setattr(llama.model.layers[1].mlp, "forward", lambda x: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                llama(prompt_ids[:, 200:250], **cache_argument(cache))
        with pytest.raises(RuntimeError, match=r"did not run through all layers.*truncate\(200\)"):
            llama(prompt_ids[:, 200:250], **cache_argument(cache))
        cache.truncate(200)
        got = llama(prompt_ids[:, 200:250], **cache_argument(cache)).logits
    assert_near(got, llama(prompt_ids[:, :250]).logits[:, 200:])


def test_generating_from_a_cropped_prompt_equals_stock(llama, prompt_ids):
    """The usual use of a cached prefix: crop its last token and generate from the whole prompt."""
    want = llama.generate(prompt_ids, max_new_tokens=8, do_sample=False)
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, gpu_kv_gb=1) as cache:
        llama(prompt_ids, **cache_argument(cache))
        cache.crop(-1)
        got = llama.generate(prompt_ids, **cache_argument(cache), max_new_tokens=8, do_sample=False)
    assert torch.equal(got, want)


def test_a_seal_that_does_not_fit_leaves_the_cache_in_prefill(llama, prompt_ids):
    tiers = tieredkv.TierConfig(**tier_options(**pressed(llama, 300, 0.5), chunk_tokens=8, text_window=16))
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, tiers, max_new_tokens=500) as cache:
        llama(prompt_ids[:, :250], **cache_argument(cache))
        with pytest.raises(tieredkv.BudgetError):
            llama(prompt_ids[:, :1], **cache_argument(cache))
        got = llama(prompt_ids[:, 250:], **cache_argument(cache)).logits
    assert_near(got, llama(prompt_ids).logits[:, 250:])


def test_the_host_tier_keeps_no_autograd_graph(llama, prompt_ids):
    with tieredkv.use_attention(llama), TieredCache(llama.config, gpu_kv_gb=1) as cache:
        llama(prompt_ids, **cache_argument(cache))
        assert not cache.tiered_layers[0].host.chunks().requires_grad


def test_a_fault_in_the_last_layers_step_is_noticed(llama, long_ids, monkeypatch):
    options = {**pressed(llama, 900, 0.4), "host_kv_bits": 16, "text_window": 16, "theta": 2}
    cache = TieredCache(llama.config, max_new_tokens=8, **tier_options(**options))
    with torch.no_grad(), tieredkv.use_attention(llama), cache:
        llama(long_ids, **cache_argument(cache))
        llama(long_ids[:, :1], **cache_argument(cache))
        last = cache.tiered_layers[-1].sealed
        with monkeypatch.context() as patch:
            patch.setattr(
                last.retrieval._fetching, "make_room", lambda *a, **k: lambda: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            with pytest.raises(KeyboardInterrupt):
                llama(long_ids[:, 1:2], **cache_argument(cache))
        with pytest.raises(RuntimeError, match="did not run through all layers"):
            llama(long_ids[:, 1:2], **cache_argument(cache))
        cache.truncate(900)
        got = llama(long_ids[:, :5], **cache_argument(cache)).logits
    want = llama(torch.cat((long_ids, long_ids[:, :5]), dim=1)).logits[:, 900:]
    assert_near(got, want)


def test_unsealing_forgets_the_rows_of_the_last_question(llama, prompt_ids):
    """The next token is prefilled, exactly, and only then may the cache be sealed anew."""
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, gpu_kv_gb=1) as cache:
        text = llama.generate(prompt_ids, **cache_argument(cache), max_new_tokens=120, do_sample=False)
        cache.unseal()
        got = llama(text[:, -1:], **cache_argument(cache)).logits
    assert_near(got, llama(text).logits[:, -1:])


def test_a_cache_without_a_reference_is_freed_at_once(llama, prompt_ids):
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        cache = TieredCache(llama.config, gpu_kv_gb=1)
        with torch.no_grad(), tieredkv.use_attention(llama):
            llama.generate(prompt_ids, **cache_argument(cache), max_new_tokens=3, do_sample=False)
        host = weakref.ref(cache.tiered_layers[0].host)
        del cache
        assert host() is None
    finally:
        gc.enable()


def test_tiers_of_another_type_are_refused(llama):
    with pytest.raises(OptionError, match="tiers is a float"):
        TieredCache(llama.config, 0.5)
