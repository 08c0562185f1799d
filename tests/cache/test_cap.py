"""The device cap holds at every moment, prefill included; the tiers hold what they say."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_near, cap_share, digest_nbytes, pressed, tier_options
from hypothesis import given, settings
from hypothesis import strategies as st

import tieredkv
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import BudgetError
from tieredkv.memory import ledger
from tieredkv.memory.host import HostLayer
from tieredkv.ops.base import Pages


@pytest.fixture
def watched(monkeypatch):
    """(used, cap) of a ledger after each of its reservations."""
    seen: list[tuple[int, int]] = []
    reserve = ledger.DeviceLedger.reserve

    def watch(self, purpose, nbytes):
        reserve(self, purpose, nbytes)
        seen.append((self.used_bytes, self.cap_bytes))

    monkeypatch.setattr(ledger.DeviceLedger, "reserve", watch)
    return seen


@pytest.mark.parametrize("theta", [0.0, 0.4, 2.0])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_cap_holds_at_every_step(llama, long_ids, watched, theta, share):
    options = {"theta": theta, "chunk_tokens": 8, "text_window": 16, "recent_window": 8, "prefill_chunk": 64}
    with (
        tieredkv.use_attention(llama),
        TieredCache(llama.config, **tier_options(**pressed(llama, 900, share), **options), max_new_tokens=30) as cache,
    ):
        llama.generate(long_ids, **cache_argument(cache), max_new_tokens=30, do_sample=False)
        assert cache.ledger.peak_bytes <= cache.ledger.cap_bytes
    assert len(watched) > 90
    assert all(used <= cap for used, cap in watched)


def test_the_ledger_counts_every_byte_of_pool_and_digests(llama, long_ids):
    with (
        tieredkv.use_attention(llama),
        TieredCache(
            llama.config, **tier_options(**pressed(llama, 900, 0.5), chunk_tokens=8, text_window=16), max_new_tokens=9
        ) as cache,
    ):
        llama.generate(long_ids, **cache_argument(cache), max_new_tokens=4, do_sample=False)
        held = cache.ledger.by_purpose()
        layers = [layer.sealed for layer in cache.tiered_layers]
        assert held["pool"] == cache.device_tier.pools[0].records.nbytes
        assert held["digests"] == sum(digest_nbytes(s.retrieval) for s in layers if s.retrieval is not None)
        tables = sum(t.numel() * 4 for s in layers for t in (s.pages.table, s.pages.lengths))
        tables += sum(t.nbytes for s in layers if len(s.dynamic) for t in vars(s.retrieval.residency).values())
        phase = layers[0].phase
        tables += phase.chunk_mass.nbytes + phase.page_lse.nbytes + phase.chunk_order.nbytes
        tables += sum(s.pages.pool.fit.centre.nbytes + s.pages.pool.fit.channels.nbytes for s in layers)
        assert held["tables"] == tables
        assert set(held) <= {"pool", "digests", "tables"}


def test_the_host_tier_holds_every_prompt_token_exactly(llama, long_ids):
    from transformers import DynamicCache

    stock = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(long_ids, **cache_argument(stock))
    with (
        tieredkv.use_attention(llama),
        TieredCache(
            llama.config,
            **tier_options(gpu_kv_gb=cap_share(llama, 900, 0.5), chunk_tokens=8, text_window=16, host_kv_bits=16),
            max_new_tokens=9,
        ) as cache,
    ):
        llama.generate(long_ids, **cache_argument(cache), max_new_tokens=9, do_sample=False)
        for ours, theirs in zip(cache.tiered_layers, stock.layers, strict=True):
            for got, want in zip(ours.host.decoded(0, 900), (theirs.keys[0], theirs.values[0]), strict=True):
                assert_near(got, want)


def of_pages(host: HostLayer, pages: Pages) -> torch.Tensor:
    """All of a layer's full chunks as records of its pages."""
    full = host.length // host.chunk_tokens
    if host.codec.bits == pages.codec.bits:
        return host.chunks(0, full)
    records = torch.zeros((host.num_heads, full, pages.codec.chunk_bytes), dtype=torch.uint8)
    encoded = pages.codec.encode(*host.decoded(0, full * host.chunk_tokens), pages.fit)
    for own, new in zip(pages.codec.fields(records), encoded, strict=True):
        own.copy_(new.unflatten(1, (full, -1)))
    return records


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_pool_and_tables_stay_sound_while_decoding(llama, long_ids, data):
    """Pages in the pool are what the tables say they are, after every step."""
    share, theta = data.draw(st.floats(0.4, 0.9)), data.draw(st.sampled_from([0.0, 0.4, 2.0]))
    length = data.draw(st.integers(300, 900))
    chunk = data.draw(st.sampled_from([4, 8]))
    options = {"theta": theta, "chunk_tokens": chunk, "text_window": 16, "recent_window": 8}
    options["pack_pages"] = data.draw(st.booleans())
    options["host_kv_bits"] = data.draw(st.sampled_from([16, 8, 4]))
    with (
        tieredkv.use_attention(llama),
        torch.no_grad(),
        TieredCache(llama.config, **tier_options(**pressed(llama, 900, share), **options), max_new_tokens=12) as cache,
    ):
        llama(long_ids[:, :length], **cache_argument(cache))
        for step in range(12):
            llama(long_ids[:, step : step + 1], **cache_argument(cache))
            cache.finish()
            for layer in cache.tiered_layers:
                sealed = layer.sealed
                if not len(sealed.dynamic):
                    continue
                sealed.retrieval.residency.check_integrity()
                sinks = sealed.phase.plan.layout.sink_chunks
                stored = of_pages(layer.host, sealed.pages.pool)
                for row, head in enumerate(sealed.dynamic.tolist()):
                    for slot, chunk in zip(
                        sealed.retrieval.residency.slots[row].tolist(),
                        sealed.retrieval.residency.chunk_in[row].tolist(),
                        strict=True,
                    ):
                        if chunk >= 0:
                            assert torch.equal(cache.device_tier.pools[0].records[slot], stored[head, sinks + chunk])


def test_more_generated_tokens_than_reserved_is_an_error(llama, prompt_ids):
    with (
        tieredkv.use_attention(llama),
        TieredCache(llama.config, gpu_kv_gb=1, max_new_tokens=3, chunk_tokens=4) as cache,
        pytest.raises(BudgetError, match=r"room for .* generated tokens and no more"),
    ):
        llama.generate(prompt_ids, **cache_argument(cache), max_new_tokens=60, do_sample=False)


def test_a_cap_that_is_too_small_is_refused_with_one_that_works(llama, long_ids):
    tiers = tier_options(chunk_tokens=8, text_window=16)
    with tieredkv.use_attention(llama):
        with (
            TieredCache(llama.config, gpu_kv_gb=1e-6, max_new_tokens=8, **tiers) as cache,
            pytest.raises(BudgetError, match="the smallest that works is") as refused,
        ):
            llama.generate(long_ids, **cache_argument(cache), max_new_tokens=8, do_sample=False)
        works = float(str(refused.value).split("works is ")[1].split(". ")[0])
        with TieredCache(llama.config, gpu_kv_gb=works, max_new_tokens=8, **tiers) as cache:
            llama.generate(long_ids, **cache_argument(cache), max_new_tokens=8, do_sample=False)
            assert cache.ledger.peak_bytes <= cache.ledger.cap_bytes


def test_closing_frees_both_tiers(llama, prompt_ids):
    cache = TieredCache(llama.config, gpu_kv_gb=1)
    with tieredkv.use_attention(llama):
        llama.generate(prompt_ids, **cache_argument(cache), max_new_tokens=4, do_sample=False)
    cache.close()
    cache.close()
    assert cache.ledger.used_bytes == 0
    assert cache.host_bytes == 0
    with tieredkv.use_attention(llama), pytest.raises(tieredkv.TieredKVError, match="closed"):
        llama(prompt_ids, **cache_argument(cache))


@pytest.mark.parametrize("share", [0.6, 1.0, 1.07, 1.4])
@pytest.mark.parametrize("chunk", [900, 200])
def test_a_prompt_of_known_length_is_served_whatever_stays_on_the_device(llama, long_ids, share, chunk):
    """A layer that sees its first token after the residents were dropped for the scores must keep none."""
    stock = llama(long_ids).logits[:, -1]
    with (
        tieredkv.use_attention(llama),
        torch.no_grad(),
        TieredCache(llama.config, gpu_kv_gb=cap_share(llama, 900, share), prompt_tokens=900, chunk_tokens=8) as cache,
    ):
        for part in long_ids.split(chunk, dim=1):
            logits = llama(part, **cache_argument(cache)).logits[:, -1]
        assert cache.ledger.peak_bytes <= cache.tiers.cap_bytes
        assert_near(logits, stock)
