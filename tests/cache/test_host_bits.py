"""The host tier in 16, 8 and 4 bits: packed once and in time; what is read back is what later tokens attend to."""

from __future__ import annotations

import pytest
import torch
from helpers import LateCopies, assert_near, cap_share, tier_options
from transformers import DynamicCache

import tieredkv
from tieredkv.cache.question import CONTEXT, Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.codecs import rotated
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import BudgetError, OptionError
from tieredkv.memory.host import HostLayer

PACKED = pytest.mark.parametrize("bits", [8, 4])


@pytest.fixture(autouse=True)
def fitted_early(monkeypatch):
    """Caches are packed from 96 tokens on."""
    for module in ("cache.tiered_cache", "memory.host", "planning.sizes"):
        monkeypatch.setattr(f"tieredkv.{module}.FIT_TOKENS", 96)


@pytest.fixture
def cache(llama):
    """`cache(bits, **options)`: a cache of `llama`, under a cap that does not bind."""

    def new(bits, **options):
        given = {"gpu_kv_gb": 1, "text_window": 8, "host_kv_bits": bits, **options}
        return TieredCache(llama.config, **tier_options(**given))

    return new


@torch.no_grad()
def read(model, cache, ids, size=100):
    """Logits of all tokens, in calls of `size`."""
    with tieredkv.use_attention(model):
        return torch.cat([model(part, **cache_argument(cache)).logits for part in ids.split(size, dim=1)], dim=1)


@torch.no_grad()
def stock(model, ids, past=None):
    """Logits of transformers alone."""
    return model(ids, **({} if past is None else cache_argument(past))).logits


def decoded(cache):
    """Keys and values of all tokens, as the host tier has them."""
    return [layer.host.decoded(0, layer.host.length) for layer in cache.tiered_layers]


def as_stock(cache, llama):
    """A cache of transformers' own with what the host tier has."""
    past = DynamicCache(config=llama.config)
    for index, (keys, values) in enumerate(decoded(cache)):
        past.update(keys.unsqueeze(0), values.unsqueeze(0), index)
    return past


@PACKED
@pytest.mark.parametrize("share", [0.3, 4.0], ids=["many blocks", "one block"])
def test_prefill_attends_to_the_decoded_past(bits, share, llama, long_ids, cache, monkeypatch):
    monkeypatch.setattr("tieredkv.planning.prefill_plan.STAGING_TOKENS", 64 if share < 1 else 2048)
    with cache(bits, gpu_kv_gb=cap_share(llama, 900, share)) as own:
        own.expect(CONTEXT)
        read(llama, own, long_ids[:, :505])
        assert {layer.host.codec.bits for layer in own.tiered_layers} == {bits}
        past = as_stock(own, llama)
        got = read(llama, own, long_ids[:, 505:600])
    assert_near(got, stock(llama, long_ids[:, 505:600], past))
    assert (got - stock(llama, long_ids[:, :600])[:, 505:]).abs().max() > 0.001


@PACKED
def test_questions_score_the_decoded_past(bits, llama, long_ids, cache, monkeypatch):
    """As a cache of 16 bits does that holds the decoded tokens."""
    monkeypatch.setattr("tieredkv.planning.prefill_plan.STAGING_TOKENS", 64)
    with cache(bits) as own, cache(16) as exact:
        own.expect(CONTEXT)
        read(llama, own, long_ids[:, :600])
        for layer, (keys, values) in zip(exact.tiered_layers, decoded(own), strict=True):
            layer.begin(keys.device, *keys.shape[::2], keys.dtype)
            layer.append(keys, values)
        for each in (own, exact):
            each.settle()
            each.expect(Question(prompt_tokens=640))
            read(llama, each, long_ids[:, 600:640], 40)
        for ours, theirs in zip(own.tiered_layers, exact.tiered_layers, strict=True):
            assert ours.host.codec.bits == bits
            assert_near(ours.rows.halves, theirs.rows.halves)


@PACKED
def test_what_stays_on_the_device_is_attended_to_as_the_model_made_it(bits, llama, long_ids, cache):
    with cache(bits, prompt_tokens=900) as own:
        got = read(llama, own, long_ids)
        assert own.device_tier.streamed_bytes == 0
    assert_near(got, stock(llama, long_ids))


@PACKED
def test_copies_at_any_moment_give_the_same(bits, llama, long_ids, cache):
    logits = []
    for copies in (None, LateCopies()):
        given = tier_options(gpu_kv_gb=1, text_window=8, host_kv_bits=bits)
        with TieredCache(llama.config, copies=copies, **given) as own:
            logits.append(read(llama, own, long_ids))
    assert torch.equal(*logits)


@PACKED
def test_a_layer_is_packed_once_and_has_room_for_the_whole_prompt(bits, llama, long_ids, cache, monkeypatch):
    packed, pack = [], HostLayer.pack
    monkeypatch.setattr(HostLayer, "pack", lambda self, *given: packed.append(self.length) or pack(self, *given))
    with cache(bits, prompt_tokens=900, prefill_chunk=64) as own:
        own.expect(CONTEXT)
        capacities = []
        for part in long_ids.split(64, dim=1):
            read(llama, own, part)
            capacities.append(own.tiered_layers[0].host.capacity)
        own.settle()
        sizes = {(layer.host.capacity, layer.host.codec.chunk_bytes) for layer in own.tiered_layers}
        assert own.host_bytes == 3 * 2 * 113 * next(iter(sizes))[1]
    assert packed == [128] * 3
    assert capacities[0] == 128  # two calls, the first with at least 96 tokens
    assert set(capacities[2:]) == {904}


@PACKED
def test_a_short_prompt_is_packed_at_the_seal(bits, llama, prompt_ids, cache):
    with cache(bits) as own:
        read(llama, own, prompt_ids[:, :90], 90)
        assert own.device_tier.host_bits == 16
        read(llama, own, prompt_ids[:, :1])
        assert own.sealed
        assert {layer.host.codec.bits for layer in own.tiered_layers} == {own.device_tier.host_bits} == {bits}


def test_packing_that_was_interrupted_goes_on_before_the_next_call(llama, prompt_ids, cache, monkeypatch):
    pack, full = HostLayer.pack, [False, True, *[False] * 8]

    def once_full(self, *given):
        if full.pop(0):
            raise OSError("no space left")
        pack(self, *given)

    with cache(4) as own, cache(4) as other:
        for each in (own, other):
            each.expect(CONTEXT)
            read(llama, each, prompt_ids[:, :90], 90)
        other.settle()
        want = read(llama, other, prompt_ids[:, :10])
        monkeypatch.setattr(HostLayer, "pack", once_full)
        with pytest.raises(OSError, match="no space"):
            own.settle()
        got = read(llama, own, prompt_ids[:, :10])
        assert {layer.host.codec.bits for layer in own.tiered_layers} == {4}
        assert torch.equal(got, want)


def test_a_prompt_that_stays_on_the_device_is_not_packed_by_default(llama, long_ids, cache):
    with cache(None) as own:
        with tieredkv.use_attention(llama):
            got = llama.generate(long_ids, **cache_argument(own), max_new_tokens=8, do_sample=False)
        assert own.device_tier.host_bits == 16
    assert torch.equal(got, llama.generate(long_ids, max_new_tokens=8, do_sample=False))


def test_a_prompt_of_unknown_length_is_packed_once_it_no_longer_fits(llama, long_ids, cache):
    with cache(None, gpu_kv_gb=cap_share(llama, 900, 1.0)) as own:
        own.expect(CONTEXT)
        read(llama, own, long_ids[:, :200])
        assert own.device_tier.host_bits == 16
        exact = [layer.host.decoded(0, 200) for layer in own.tiered_layers]
        read(llama, own, long_ids[:, 200:])
        assert own.device_tier.host_bits == 8
        for layer, (keys, _) in zip(own.tiered_layers, exact, strict=True):
            now = layer.host.decoded(0, 200)[0]
            assert not torch.equal(now, keys)
            torch.testing.assert_close(now, keys, atol=0.05 * keys.abs().max().item(), rtol=0)


def test_settled_bits_stay_whatever_follows(llama, long_ids, cache):
    with cache(None, gpu_kv_gb=cap_share(llama, 900, 1.0)) as own:
        own.expect(CONTEXT)
        read(llama, own, long_ids[:, :200])
        own.settle()
        before = decoded(own)
        read(llama, own, long_ids[:, 200:])
        own.truncate(200)
        assert own.device_tier.host_bits == 16
        for was, now in zip(before, decoded(own), strict=True):
            assert torch.equal(was[0], now[0])


@PACKED
def test_what_follows_the_context_depends_on_no_earlier_question(bits, llama, long_ids, cache):
    context, first, second = long_ids.split([700, 100, 100], dim=1)
    logits = []
    for asked in ([second], [first, second]):
        with cache(bits, prompt_tokens=900, gpu_kv_gb=cap_share(llama, 900, 1.2)) as own:
            own.expect(CONTEXT)
            read(llama, own, context)
            own.settle()
            for question in asked:
                own.truncate(700)
                got = read(llama, own, question)
            logits.append(got)
    assert torch.equal(*logits)


@PACKED
def test_generated_tokens_come_back_as_they_were_on_the_device(bits, llama, prompt_ids, cache):
    with cache(bits, max_new_tokens=20) as own:
        read(llama, own, prompt_ids, 300)
        for token in prompt_ids[0, :19]:
            read(llama, own, token.view(1, 1))
        there = [layer.sealed.pages.generated_tokens() for layer in own.tiered_layers]
        own.unseal()
        for layer, parts in zip(own.tiered_layers, there, strict=True):
            for now, then in zip(layer.host.decoded(300, 319), parts, strict=True):
                assert_near(now, then.float())


def test_an_empty_cache_may_have_other_bits_again(llama, long_ids, cache):
    with cache(8) as own:
        read(llama, own, long_ids[:, :300])
        own.truncate(0)
        assert own.device_tier.host_bits == 16
        own.set_tiers(tieredkv.TierConfig(gpu_kv_gb=1, host_kv_bits=16))
        got = read(llama, own, long_ids)
    assert_near(got, stock(llama, long_ids))


def test_settings_with_other_bits_than_the_caches_are_refused(llama, long_ids, cache):
    with cache(8) as own:
        read(llama, own, long_ids[:, :300])
        with pytest.raises(OptionError, match="the cache is kept in 8 bits: leave host_kv_bits as it is"):
            own.set_tiers(tieredkv.TierConfig(gpu_kv_gb=1, host_kv_bits=4))
        own.set_tiers(tieredkv.TierConfig(gpu_kv_gb=2))


def test_a_seal_that_does_not_fit_leaves_the_tokens_exact(llama, prompt_ids, cache):
    with cache(4, gpu_kv_gb=cap_share(llama, 300, 0.5), max_new_tokens=2000) as own:
        read(llama, own, prompt_ids[:, :90], 90)
        exact = decoded(own)
        with pytest.raises(BudgetError):
            read(llama, own, prompt_ids[:, :1])
        assert own.device_tier.host_bits == 16
        for was, now in zip(exact, decoded(own), strict=True):
            assert torch.equal(was[0], now[0])


@PACKED
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_cache_packed_in_inference_mode_continues_in_another(bits, mode, llama, long_ids, cache):
    rotated.hadamard.cache_clear()
    with cache(bits, gpu_kv_gb=cap_share(llama, 900, 0.5), max_new_tokens=4) as own, tieredkv.use_attention(llama):
        with torch.inference_mode():
            for part in long_ids[:, :400].split(100, dim=1):
                llama(part, **cache_argument(own))
            llama(long_ids[:, :1], **cache_argument(own))
        with mode():
            llama(long_ids[:, 1:2], **cache_argument(own))
            got = llama(long_ids[:, 402:500], **cache_argument(own)).logits
    assert got.isfinite().all()
