"""Pages of 16, 8 and 4 bits: which are used, how close the answers are, and how much room they take."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from helpers import assert_near, cap_share, tier_options
from transformers import DynamicCache

import tieredkv
from tieredkv.attention import exact
from tieredkv.cache.question import Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.codecs import CODECS
from tieredkv.environment.versions import cache_argument

BITS = pytest.mark.parametrize("bits", sorted(CODECS))


@contextmanager
def tiered(model, **fields):
    tiers = tieredkv.TierConfig(**tier_options(text_window=16, **fields))
    with torch.no_grad(), tieredkv.use_attention(model), TieredCache(model.config, tiers, max_new_tokens=9) as cache:
        yield cache


def answered(model, ids, **fields):
    """Logits of eight forced tokens after a prompt, the cache's bytes by purpose, and its plan."""
    with tiered(model, **fields) as cache:
        out = steps(model, ids, cache)
        return out, cache.ledger.by_purpose(), cache.tiered_layers[0].sealed.phase.plan


def steps(model, ids, cache):
    model(ids[:, :-8], **cache_argument(cache))
    return torch.cat([model(ids[:, i : i + 1], **cache_argument(cache)).logits for i in range(-8, -1)], dim=1)


POLICIES = pytest.mark.parametrize("policy", ["hybridkv", "quest", "snapkv", "lookm"])


@pytest.mark.parametrize("policy", ["hybridkv", "snapkv"])
@BITS
def test_pages_hold_what_the_host_tier_decodes_to(llama, long_ids, policy, bits):
    """Attention of a layer whose pages hold everything, in dynamic heads and in static ones."""
    theta = {"theta": 2.0} if policy == "hybridkv" else {}
    with tiered(llama, gpu_kv_gb=1, host_kv_bits=bits, policy=policy, **theta) as cache:
        llama(long_ids, **cache_argument(cache))
        cache.seal()
        layer, query = cache.tiered_layers[1], torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(0))
        out, lse = layer.sealed.pages.attend(query, 0.3)
        assert layer.sealed.phase.plan.page_bits == bits
        want, want_lse = exact.attend(query, *layer.host.decoded(0, 900), 0.3, causal=False)
    assert_near(out, want)
    assert_near(lse, want_lse)


@POLICIES
def test_logits_are_close_to_those_of_unpacked_pages(text_model, long_ids, policy):
    fields = {"gpu_kv_gb": 1, "budget_ratio": 0.4, "policy": policy, "stay": 1.0, "host_kv_bits": 16}
    packed, _, plan = answered(text_model, long_ids, **fields)
    exact, _, other = answered(text_model, long_ids, **fields, pack_pages=False)
    assert (plan.page_bits, other.page_bits) == (8, 16)
    assert torch.equal(plan.selected, other.selected)
    assert (packed - exact).abs().max() < 0.05 * exact.abs().max()  # near ties in rank may be decided differently
    assert not torch.equal(packed, exact)


@pytest.mark.parametrize(("bits", "off"), [(8, 0.02), (4, 0.3)])
def test_logits_over_a_packed_host_tier_are_close_to_exact_ones(text_model, long_ids, bits, off):
    packed, _, plan = answered(text_model, long_ids, gpu_kv_gb=1, host_kv_bits=bits)
    assert plan.page_bits == bits
    assert not plan.ranked
    exact = text_model(long_ids).logits[:, -8:-1]
    assert (packed - exact).abs().max() < off * exact.abs().max()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("share", [0.4, 2.0])
def test_known_tokens_decoded_at_once_are_rounded_as_pages_are(llama, long_ids, bits, share):
    """Chunks are ranked, or every step attends to everything."""
    fields = {"gpu_kv_gb": 1, "host_kv_bits": bits, "stay": 1.0} | ({"budget_ratio": share} if share < 1 else {})
    one_by_one, _, plan = answered(llama, long_ids, **fields)
    assert plan.ranked == (share < 1)
    with tiered(llama, **fields) as cache:
        llama(long_ids[:, :-8], **cache_argument(cache))
        cache.seal()
        with cache.forced():
            at_once = llama(long_ids[:, -8:-1], **cache_argument(cache)).logits
    assert_near(at_once, one_by_one)


@pytest.mark.parametrize(("bits", "number"), [(8, 1), (4, 0.5)])
def test_a_packed_pool_takes_the_bytes_of_its_numbers_and_scales(llama, long_ids, bits, number):
    fields = {"gpu_kv_gb": 1, "budget_ratio": 0.4}
    _, packed, plan = answered(llama, long_ids, **fields, host_kv_bits=bits)
    _, exact, _ = answered(llama, long_ids, **fields, host_kv_bits=16, pack_pages=False)
    per_vector, pages = number * llama.config.head_dim + 2, plan.pool_pages([*range(llama.config.num_hidden_layers)])
    assert packed["pool"] == pages * 2 * plan.layout.chunk_tokens * per_vector
    assert packed["pool"] * 4 * llama.config.head_dim == exact["pool"] * per_vector  # the model is in float32


def test_what_a_step_copies_is_counted_in_records(llama, long_ids):
    copied = {}
    for bits in CODECS:
        with tiered(llama, gpu_kv_gb=1, budget_ratio=0.2, theta=2.0, stay=1.0, host_kv_bits=bits) as cache:
            steps(llama, long_ids, cache)
            cache.finish()
            missed, record = cache.counters.missed_bytes, cache.tiered_layers[0].host.codec.chunk_bytes
            assert missed % record == 0
            copied[bits] = missed // record
    assert copied[8] == pytest.approx(copied[16], rel=0.2)
    assert copied[4] == pytest.approx(copied[16], rel=0.2)


def test_under_one_cap_more_chunks_of_fewer_bits_are_attended_to(llama, long_ids):
    cap = cap_share(llama, long_ids.shape[1], 0.4)
    _, _, exact = answered(llama, long_ids, gpu_kv_gb=cap, host_kv_bits=16, pack_pages=False)
    _, _, eight = answered(llama, long_ids, gpu_kv_gb=cap, host_kv_bits=8)
    _, _, four = answered(llama, long_ids, gpu_kv_gb=cap, host_kv_bits=4)
    assert eight.pages.sum() > 1.5 * exact.pages.sum()
    assert four.pages.sum() > 1.2 * eight.pages.sum()


def test_what_fits_unpacked_is_not_packed(llama, long_ids):
    logits, _, plan = answered(llama, long_ids, gpu_kv_gb=1)
    assert plan.page_bits == 16
    assert_near(logits, llama(long_ids).logits[:, -8:-1])


def test_where_everything_fits_in_eight_bits_nothing_is_left_out(llama, long_ids):
    cap = cap_share(llama, long_ids.shape[1] + 9, 0.9)
    logits, _, plan = answered(llama, long_ids, gpu_kv_gb=cap)
    assert plan.page_bits == 8
    assert not plan.ranked
    stock = llama(long_ids).logits[:, -8:-1]
    assert (logits - stock).abs().max() < 0.02 * stock.abs().max()


@pytest.mark.parametrize("tokens", [1, 3, 20, 33])
def test_a_short_prompt_that_is_attended_to_whole_is_exact_under_any_ratio(llama, prompt_ids, tokens):
    ids = prompt_ids[:, : tokens + 8]
    logits, _, plan = answered(llama, ids, gpu_kv_gb=1, budget_ratio=0.1)
    assert plan.page_bits == 16
    assert_near(logits, llama(ids).logits[:, -8:-1])


@pytest.mark.parametrize("policy", ["hybridkv", "snapkv"])
@pytest.mark.parametrize("chunk_tokens", [8, 64])
@BITS
def test_a_seal_takes_less_than_the_cap(llama, policy, chunk_tokens, bits):
    """What a seal allocates, what it keeps included, by torch's profiler."""
    ids = torch.randint(0, 97, (1, 6000), generator=torch.Generator().manual_seed(0))
    options = {"gpu_kv_gb": cap_share(llama, 6000, 0.2), "chunk_tokens": chunk_tokens, "policy": policy}
    options["host_kv_bits"] = bits
    with tiered(llama, **options) as cache:
        llama(ids, **cache_argument(cache))
        cache.settle()  # packs the host tier
        cache.expect(Question(max_new_tokens=9))
        llama(ids[:, :16], **cache_argument(cache))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            cache.seal()
        assert cache.tiered_layers[0].sealed.phase.plan.page_bits == min(bits, 8)
        live = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        assert peak <= cache.tiers.cap_bytes


def test_the_full_cache_is_never_packed(llama, long_ids):
    with pytest.raises(tieredkv.BudgetError):
        answered(llama, long_ids, policy="full", gpu_kv_gb=cap_share(llama, long_ids.shape[1], 0.6))


@BITS
def test_generated_tokens_return_to_the_host_as_the_pool_stored_them(llama, long_ids, bits):
    stock = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(long_ids, **cache_argument(stock))
    with tiered(llama, gpu_kv_gb=1, budget_ratio=0.9, host_kv_bits=bits) as cache:
        steps(llama, long_ids, cache)
        cache.unseal()
        taken = cache.tiered_layers[0].host.tokens(1, torch.arange(893, 899))
    for got, want in zip(taken, (stock.layers[0].keys, stock.layers[0].values), strict=True):
        wanted = want[0, 1, 893:899]
        assert (got - wanted).abs().max() < (0.02 if bits > 4 else 0.3) * wanted.abs().max()
        assert not torch.equal(got, wanted)
