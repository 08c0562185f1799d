"""All layers in the decode phase: steps are counted, and what was counted is undone."""

from __future__ import annotations

import pytest
import torch
from helpers import pressed, tier_options

import tieredkv
from tieredkv.cache.looks import Looks
from tieredkv.cache.question import Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import BudgetError


@pytest.fixture
def cache(llama, long_ids):
    """Sealed after 900 tokens, with dynamic heads and room for five more tokens, or a page of eight."""
    options = {**pressed(llama, 900, 0.4), "chunk_tokens": 8, "text_window": 16, "theta": 2}
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, **tier_options(**options)) as made:
        made.expect(Question(max_new_tokens=5, looks=Looks(8)))
        llama(long_ids, **cache_argument(made))
        made.seal()
        yield made


def test_going_back_undoes_what_was_counted(llama, long_ids, cache):
    llama(long_ids[:, :1], **cache_argument(cache))
    position = cache.decoding.position()
    for _ in range(2):
        cache.decoding.advance()
    assert cache.get_seq_length() == 903
    cache.decoding.go_back(position)
    assert cache.decoding.position() == position
    assert cache.get_seq_length() == 901
    most = cache.tiered_layers[0].sealed.retrieval.selected.sum() * len(cache.tiered_layers)
    assert cache.counters.selected == int(most)


def test_going_back_forgets_a_step_that_was_interrupted(llama, long_ids, cache, monkeypatch):
    position = cache.decoding.position()
    with monkeypatch.context() as patch:
        patch.setattr(cache.tiered_layers[1].sealed, "step", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            llama(long_ids[:, :1], **cache_argument(cache))
    cache.decoding.go_back(position)
    llama(long_ids[:, :1], **cache_argument(cache))
    assert cache.get_seq_length() == 901


def test_more_tokens_than_there_is_room_for_are_refused(cache):
    sealed = cache.tiered_layers[0].sealed
    room = 8 * sealed.phase.plan.layout.recent_pages - sealed.pages.recent_tokens
    for _ in range(room):
        cache.decoding.advance()
    with pytest.raises(BudgetError, match=f"room for {room} generated tokens and no more"):
        cache.decoding.advance()


def test_a_step_is_recorded_once(llama, long_ids, cache):
    looks = cache.question.looks
    for count in (1, 2):
        llama(long_ids[:, count : count + 1], **cache_argument(cache))
        cache.decoding.record_step()
        assert len(looks.steps) == count
        assert float(looks.steps[-1].sum()) > 0
        assert float(cache.tiered_layers[0].sealed.phase.chunk_mass.sum()) == 0


def test_counters_outlive_the_phase(llama, long_ids, cache):
    llama(long_ids[:, :1], **cache_argument(cache))
    cache.unseal()
    assert cache.decoding is None
    assert cache.counters.selected > 0
