"""The parts of a retrieval, each alone: whether chunks are reused, what is counted, what an interrupted step leaves."""

from __future__ import annotations

import pytest
import torch
from helpers import pressed, tier_options

import tieredkv
from tieredkv import TieredCache
from tieredkv.cache.counters import Counters
from tieredkv.cache.looks import Looks
from tieredkv.cache.question import Question
from tieredkv.cache.ranking import Reuse
from tieredkv.cache.recording import Tally, UnseenMass
from tieredkv.environment.versions import cache_argument
from tieredkv.memory.ledger import DeviceLedger

CPU = torch.device("cpu")


@pytest.fixture
def reuse():
    return Reuse(0.9, (2, 3, 8), DeviceLedger(10_000), CPU)


def test_the_first_step_reuses_nothing(reuse):
    ranks, chosen = torch.rand(2, 5), torch.rand(2, 5) < 0.5
    own, alike = reuse.ranks(ranks, torch.randn(2, 3, 8), chosen)
    assert not alike.any()
    assert torch.equal(own, ranks)


def test_a_head_whose_query_stays_reuses_the_previous_chunks(reuse):
    ranks, chosen, query = torch.rand(2, 5), torch.rand(2, 5) < 0.5, torch.randn(2, 3, 8)
    reuse.ranks(ranks, query, chosen)
    changed = torch.stack((query[0] * 1.1, -query[1]))
    own, alike = reuse.ranks(ranks, changed, chosen)
    assert alike.tolist() == [True, False]
    assert torch.equal(own[0], chosen[0].float())
    assert torch.equal(own[1], ranks[1])


def test_a_query_is_compared_with_the_previous_one_and_no_earlier_one(reuse):
    ranks, chosen, first, second = torch.rand(2, 5), torch.ones(2, 5).bool(), torch.ones(2, 3, 8), -torch.ones(2, 3, 8)
    reuse.ranks(ranks, first, chosen)
    assert not reuse.ranks(ranks, second, chosen)[1].any()
    assert reuse.ranks(ranks, second, chosen)[1].all()
    assert not reuse.ranks(ranks, first, chosen)[1].any()


def test_counts_are_added_once():
    tally, counters = Tally(3, CPU), Counters(selected=1)
    for _ in range(2):
        tally.selected += 5
        tally.missed += torch.tensor([1, 0, 2])
        tally.reused += 2
        tally.ahead += torch.tensor([0, 0, 1])
        tally.unseen += 0.25
    tally.flush(counters, 100)
    tally.flush(counters, 100)
    assert (counters.selected, counters.resident, counters.reused) == (1 + 30, 30 - 6, 12)
    assert (counters.missed_bytes, counters.prefetched_bytes, counters.unseen_sum) == (600, 200, 1.5)


def test_nothing_is_left_of_an_interrupted_step(llama, long_ids, monkeypatch):
    """Scratch is no longer counted, and the next step is recorded as if there had been none before."""
    tiers = tier_options(**pressed(llama, 900, 0.4), chunk_tokens=8, text_window=16, theta=2.0)
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, **tiers) as cache:
        cache.expect(Question(max_new_tokens=8, looks=Looks(8)))
        llama(long_ids, **cache_argument(cache))
        cache.seal()
        layer = cache.tiered_layers[0].sealed
        step = torch.randn(4, 16), torch.randn(2, 16), torch.randn(2, 16), 0.25
        before = cache.ledger.by_purpose()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(UnseenMass, "record", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            layer.step(*step)
        assert cache.ledger.by_purpose() == before
        layer.step(*step)
        assert cache.ledger.by_purpose() == before
