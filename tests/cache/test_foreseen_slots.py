"""Slots and bytes while queries are predicted: what was copied for a step stays until the step has had it."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from helpers import LateCopies, pressed, tier_options
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cap import of_pages

import tieredkv
from tieredkv.cache.looks import Looks
from tieredkv.cache.question import Question
from tieredkv.cache.retrieval import Retrieval
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.memory import ledger
from tieredkv.memory.copies import ThreadCopies

STEPS = 5


class AtOnceCopies(LateCopies):
    """Copies happen when they are asked for."""

    def submit(self, key, copy):
        copy()


class Watched:
    """Copies of which is known what they left in a layer's tables."""

    def __init__(self, copies):
        self._copies, self.cache = copies, None
        self.placed = {}
        """By layer: its `slot_of` after the copies for a predicted query."""

    def submit(self, key, copy):
        def seen():
            moved = copy()
            self.placed[key] = self.tables(key).slot_of.clone()
            return moved

        self._copies.submit(key, copy if isinstance(key, str) else seen)

    def wait(self, key):
        moved = self._copies.wait(key)
        if key in self.placed:
            assert torch.equal(self.tables(key).slot_of, self.placed[key]), "something was evicted before the step"
        return moved

    def tables(self, key):
        return self.cache.tiered_layers[key].sealed.retrieval.residency

    def drain(self):
        self._copies.drain()

    def close(self):
        self._copies.close()


KINDS = {"at once": AtOnceCopies, "late": LateCopies, "on a thread": ThreadCopies}


@contextmanager
def bounded():
    """Inside the block no reservation may exceed its ledger's cap. Yields a list of them."""
    reserve, seen = ledger.DeviceLedger.reserve, []

    def watch(self, purpose, nbytes):
        reserve(self, purpose, nbytes)
        seen.append((self.used_bytes, self.cap_bytes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger.DeviceLedger, "reserve", watch)
        yield seen
    assert all(used <= cap for used, cap in seen)


def assert_sound(layer, placed):
    """The pool holds what a layer's tables say. placed: chunks that are attended to are where the copies left them."""
    sealed = layer.sealed
    if sealed.retrieval is None:
        return
    tables, sinks = sealed.retrieval.residency, sealed.phase.plan.layout.sink_chunks
    tables.check_integrity()
    if placed is not None:
        kept = tables.chosen & (placed[:, :-1] >= 0)
        assert torch.equal(tables.slot_of[:, :-1][kept], placed[:, :-1][kept]), "evicted before it was attended to"
    stored = of_pages(layer.host, sealed.pages.pool)
    for row, head in enumerate(sealed.dynamic.tolist()):
        there = tables.chunk_in[row] >= 0
        slots, chunks = tables.slots[row][there].long(), tables.chunk_in[row][there].long()
        assert torch.equal(sealed.pages.pool.records[slots], stored[head, sinks + chunks])


def decode(model, ids, kind, looks, **options):
    """Steps with predicted queries. Returns how many bytes were copied for these."""
    copies = Watched(KINDS[kind]())
    tiers = tier_options(**options, chunk_tokens=8, text_window=16, recent_window=8, ahead=True)
    with (
        bounded() as reserved,
        torch.no_grad(),
        tieredkv.use_attention(model),
        TieredCache(model.config, **tiers, copies=copies) as cache,
    ):
        copies.cache = cache
        cache.expect(Question(max_new_tokens=STEPS, looks=Looks(STEPS) if looks else None))
        model(ids, **cache_argument(cache))
        for step in range(STEPS):
            copies.placed.clear()
            model(ids[:, step : step + 1], **cache_argument(cache))
            cache.decoding.record_step()
            assert set(cache.ledger.by_purpose()) <= {"pool", "digests", "tables"}, "scratch is over"
            for layer in cache.tiered_layers:
                assert_sound(layer, copies.placed.get(layer.index))
        assert cache.ledger.peak_bytes <= cache.ledger.cap_bytes
        assert len(reserved) > STEPS
        return cache.counters.prefetched_bytes


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_what_is_foreseen_stays_until_its_step_and_the_cap_holds(llama, long_ids, data):
    options = {
        **pressed(llama, 900, data.draw(st.floats(0.4, 0.9))),
        "theta": data.draw(st.sampled_from([0.4, 2.0])),
        "spare_ratio": data.draw(st.sampled_from([0.0, 0.1, 0.4])),
        "adaptive": data.draw(st.booleans()),
        "host_kv_bits": data.draw(st.sampled_from([16, 8, 4])),
        "pack_pages": data.draw(st.booleans()),
    }
    decode(
        llama,
        long_ids[:, : data.draw(st.integers(300, 900))],
        data.draw(st.sampled_from(sorted(KINDS))),
        data.draw(st.booleans()),
        **options,
    )


RANKED = {"theta": 2.0, "stay": 1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_foreseen(llama, long_ids, kind):
    """Without which nothing would be watched."""
    assert decode(llama, long_ids[:, :600], kind, False, **pressed(llama, 600, 0.5), **RANKED) > 0


def test_an_eviction_between_copies_and_step_is_found(llama, long_ids, monkeypatch):
    """A second prediction, of the opposite, takes slots that the first has filled."""
    foresee = Retrieval.foresee

    def twice(retrieval, query, scaling):
        foresee(retrieval, query, scaling)
        retrieval._ahead._prefetcher._copies.submit("another", lambda: _again(retrieval, query, scaling))

    def _again(retrieval, query, scaling):
        ranks = -retrieval.ranking.ranks(retrieval.ranking.logits(query(), scaling), retrieval.residency.chosen)
        return retrieval._ahead._found(ranks, retrieval._slots, retrieval._tally.ahead, None)()

    monkeypatch.setattr(Retrieval, "foresee", twice)
    with pytest.raises(AssertionError, match="something was evicted before the step"):
        decode(llama, long_ids[:, :600], "at once", False, **pressed(llama, 600, 0.5), **RANKED)


def test_a_step_that_evicts_what_it_attends_to_is_found(llama, long_ids, monkeypatch):
    """Nothing is kept but what the step before attended to."""
    from tieredkv.cache.fetching import Fetching

    make_room = Fetching.make_room

    def careless(fetching, wanted, kept, missed, misses, total, listing):
        if listing is not None:
            kept = torch.zeros_like(kept)
        return make_room(fetching, wanted, kept, missed, misses, total, listing)

    monkeypatch.setattr(Fetching, "make_room", careless)
    with pytest.raises(AssertionError, match="evicted before it was attended to"):
        decode(llama, long_ids[:, :600], "at once", False, **pressed(llama, 600, 0.5), **RANKED)
