"""A layer's correction of predicted queries: when it is fitted, to what, and what is kept."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch
from helpers import LateCopies, pressed, tier_options

import tieredkv
from tieredkv.cache.correcting import GROWTH, LEAST_TOKENS, ROWS, Correcting
from tieredkv.cache.question import CONTEXT, Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.models.sight import Watch
from tieredkv.policy.correction import fit_correction


@pytest.fixture
def tiers(llama):
    return {**pressed(llama, 600, 0.5), "chunk_tokens": 8, "text_window": 16, "theta": 2.0, "ahead": True}


@pytest.fixture
def reading(llama, long_ids, tiers):
    """A cache that has read so many tokens in calls of so many."""

    def read(tokens, size, **options):
        cache = TieredCache(llama.config, **tier_options(**{**tiers, **options}), copies=LateCopies())
        cache.expect(CONTEXT)
        for part in long_ids[:, :tokens].split(size, dim=1):
            llama(part, **cache_argument(cache))
        return cache

    with torch.no_grad(), tieredkv.use_attention(llama):
        yield read


def corrections(cache):
    return [layer.correcting.correction() for layer in cache.tiered_layers]


def test_it_is_fitted_to_what_predictions_missed(llama, reading, monkeypatch):
    """To the true queries of evenly spread tokens, less what the prediction says of them."""
    learned = {}
    learn = Correcting.learn

    def watched(correcting, rows, missed, length):
        learned[id(correcting)] = rows, missed, length
        learn(correcting, rows, missed, length)

    monkeypatch.setattr(Correcting, "learn", watched)
    streams, layers = {}, llama.model.layers

    def keep(name, index):
        return lambda module, inputs: streams.__setitem__((name, index), inputs[0][0])

    hooks = [layer.post_attention_layernorm.register_forward_pre_hook(keep("mid", i)) for i, layer in enumerate(layers)]
    hooks += [layer.input_layernorm.register_forward_pre_hook(keep("in", i)) for i, layer in enumerate(layers)]
    cache = reading(300, 300)
    found = corrections(cache)
    for hook in hooks:
        hook.remove()
    assert found[0] is None
    assert len(found) > 2
    for index in range(1, len(layers)):
        layer, own = layers[index], cache.tiered_layers[index].correcting
        rows = layer.input_layernorm(streams["mid", index - 1])
        missed = layer.self_attn.q_proj(layer.input_layernorm(streams["in", index])) - layer.self_attn.q_proj(rows)
        assert torch.equal(learned[id(own)][0], rows)
        torch.testing.assert_close(learned[id(own)][1], missed)
        assert learned[id(own)][2] == 300
        wanted = fit_correction(rows, missed)
        torch.testing.assert_close(found[index].down @ found[index].up, wanted.down @ wanted.up)


def test_when_it_is_fitted():
    own = Correcting(None)
    assert own.rows(0, LEAST_TOKENS - 1) == 0
    assert own.rows(0, LEAST_TOKENS) == LEAST_TOKENS
    assert own.rows(10_000, 4096) == ROWS
    own.learn(torch.randn(20, 16), torch.randn(20, 8), 1000)
    assert own.correction() is not None
    assert own.rows(GROWTH * 1000 - 501, 500) == 0
    assert own.rows(GROWTH * 1000 - 500, 500) == 500
    own.forget()
    assert own.correction() is None
    assert own.rows(0, 200) == 200


class OnCard(torch.Tensor):
    device = torch.device("cuda")


@pytest.fixture
def beside():
    """As beside a card: a `Correcting`, and its fits, which end when they are told to."""
    fits = []

    class Tier:
        def beside(self, work, later):
            fits.append((Future(), work))
            return fits[-1][0]

    return Correcting(Tier()), fits


def on_card(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).as_subclass(OnCard)


def test_beside_a_card_nobody_waits_for_a_fit_but_who_saves_it(beside):
    """The question then goes by the one before, or by none."""
    own, fits = beside
    rows, missed = on_card(20, 16), on_card(20, 8)
    own.learn(rows, missed, 1000)
    assert own.correction() is None
    fits[0][0].set_result(fits[0][1]())
    first = own.correction()
    assert first is fits[0][0].result() is not None
    own.learn(rows + 1, missed, 4000)
    assert own.correction() is first
    fits[1][0].set_result(second := fits[1][1]())
    assert torch.equal(own.state()["ahead.down"], second.down)
    assert own.correction() is second


def test_one_that_was_fitted_serves_while_the_next_is_fitted(beside):
    """Also if nobody asked for it before."""
    own, fits = beside
    for length in (1000, 4000):
        own.learn(on_card(20, 16), on_card(20, 8), length)
        if length == 1000:
            fits[0][0].set_result(first := fits[0][1]())
    assert own.correction() is first


def test_a_fit_that_fails_is_reported_once(beside):
    """And does not keep later questions from being answered."""
    own, fits = beside
    own.learn(on_card(20, 16), on_card(20, 8), 1000)
    fits[0][0].set_exception(MemoryError())
    with pytest.raises(MemoryError):
        own.correction()
    assert own.correction() is None


def test_what_the_dtype_cannot_hold_is_none():
    """float16 ends at 65,504, and a prediction that is not a number would rank nothing."""
    own, rows = Correcting(None), torch.randn(200, 16).half()
    own.learn(rows, torch.randn(200, 8).half(), 1000)
    assert own.correction() is not None
    own.learn(rows / 1000, rows[:, :8] * 1000, 4000)
    assert own.correction() is None


def test_short_calls_and_switched_off_ones_fit_nothing(reading):
    assert corrections(reading(500, LEAST_TOKENS - 1)) == [None, None, None]
    assert corrections(reading(300, 300, ahead=False)) == [None, None, None]
    assert corrections(reading(300, 300, prefetch=False)) == [None, None, None]
    assert corrections(reading(300, 300, ahead=None)) == [None, None, None], "on a CPU"


def test_nothing_is_fitted_to_what_follows_a_settled_context(llama, long_ids, reading):
    cache = reading(140, 140)
    found = corrections(cache)
    cache.settle()
    llama(long_ids[:, :500].repeat(1, 2), **cache_argument(cache))
    assert all(now is then for now, then in zip(corrections(cache), found, strict=True))


def test_nothing_is_fitted_where_everything_fits(reading):
    """No step then ranks chunks. A prompt of unknown length may still grow."""
    assert corrections(reading(500, 250, gpu_kv_gb=1.0, budget_ratio=None)) == [None, None, None]
    assert corrections(reading(500, 250, gpu_kv_gb=0.00009, budget_ratio=None))[1] is not None
    assert corrections(reading(500, 250, reuse_above=0.9)) == [None, None, None]


def test_another_context_is_fitted_anew(reading):
    cache = reading(300, 300)
    cache.truncate(100)
    assert corrections(cache)[1] is not None
    cache.truncate(0)
    assert corrections(cache)[1] is None


def test_a_device_copy_is_counted_against_the_cap(llama, long_ids, reading):
    cache = reading(500, 250)
    cache.expect(Question(max_new_tokens=8))
    llama(long_ids[:, 500:540], **cache_argument(cache))
    cache.seal()
    found = [layer.sealed.correction for layer in cache.tiered_layers]
    assert found[0] is None
    assert all(one is not None and one.nbytes > 0 for one in found[1:])
    held = cache.ledger.used_bytes
    for layer in cache.tiered_layers:
        layer.correcting.forget()
    cache.truncate(500)
    llama(long_ids[:, 500:540], **cache_argument(cache))
    cache.seal()
    assert held - cache.ledger.used_bytes == sum(one.nbytes for one in found[1:])


def test_fewer_chunks_are_waited_for(llama, long_ids, reading):
    """Where each MLP adds a constant to the stream, which no projection of the stream before it can know."""
    constant = 3 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    hooks = [layer.mlp.register_forward_hook(lambda *call: call[-1] + constant) for layer in llama.model.layers]
    waited = []
    for corrected in (False, True):
        cache = reading(500, 500)
        if not corrected:
            for layer in cache.tiered_layers:
                layer.correcting.forget()
        cache.expect(Question(max_new_tokens=20))
        llama(long_ids[:, 500:540], **cache_argument(cache))
        cache.seal()
        for place in range(16):
            llama(long_ids[:, place : place + 1], **cache_argument(cache))
        waited.append(cache.counters.missed_bytes)
    for hook in hooks:
        hook.remove()
    assert waited[1] < waited[0]


def test_a_call_that_is_interrupted_leaves_nothing_to_compare(llama, long_ids, reading, monkeypatch):
    cache = reading(200, 200)
    before = corrections(cache)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llama.model.layers[1].mlp, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        llama(long_ids[:, :150].repeat(1, 5), **cache_argument(cache))
    cache.truncate(200)
    begun = corrections(cache)
    assert begun[1] is not before[1], "the first layer had passed it on"
    assert begun[2] is before[2]
    llama(long_ids[:, 200:210], **cache_argument(cache))
    assert all(now is then for now, then in zip(corrections(cache), begun, strict=True))


def test_the_hooks_belong_to_the_block(llama):
    hooks = sum(len(module._forward_pre_hooks) for module in llama.modules())
    watch = Watch(llama)
    watch.end()
    assert sum(len(module._forward_pre_hooks) for module in llama.modules()) == hooks


def test_a_closed_cache_keeps_none(reading):
    cache = reading(300, 300)
    cache.close()
    assert corrections(cache) == [None, None, None]
