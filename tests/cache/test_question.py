"""Questions: which of the tokens that follow are scored, and when the cache seals itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import assert_near, tier_options

import tieredkv
from tieredkv.cache.looks import Looks
from tieredkv.cache.question import CONTEXT, Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import OptionError
from tieredkv.planning.prefill_plan import Call


@pytest.mark.parametrize(
    ("question", "past", "new", "rows"),
    [
        (Question(), 0, 5, 5),
        (Question(), 0, 100, 64),
        (Question(rows=10), 100, 100, 10),
        (Question(prompt_tokens=200), 0, 199, 0),
        (Question(prompt_tokens=200), 0, 200, 64),
        (Question(prompt_tokens=200), 199, 1, 1),
        (Question(prompt_tokens=200), 300, 20, 20),
        (CONTEXT, 0, 100, 0),
    ],
)
def test_only_the_call_that_may_be_the_last_is_scored(question, past, new, rows):
    assert question.call(past, new, text_window=64) == Call(past, past + new, rows)


@pytest.mark.parametrize(
    "fields", [{"max_new_tokens": -1}, {"prompt_tokens": 2.5}, {"rows": -3}, {"prompt_tokens": None}], ids=str
)
def test_invalid_counts_are_refused(fields):
    with pytest.raises(OptionError, match=f"{next(iter(fields))}=.*whole number of at least 0"):
        Question(**fields)


def test_a_question_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Question().rows = 3


def test_a_context_is_not_scored_and_never_seals(llama, long_ids):
    stock = llama(long_ids[:, :203]).logits[:, -1]
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, gpu_kv_gb=1) as cache:
        cache.expect(CONTEXT)
        for part in (long_ids[:, :200], *long_ids[:, 200:203].split(1, dim=1)):
            logits = llama(part, **cache_argument(cache)).logits[:, -1]
        assert not cache.sealed
        assert all(layer.rows is None for layer in cache.tiered_layers)
        with pytest.raises(RuntimeError, match="no text rows were scored"):
            cache.seal()
    assert_near(logits, stock)


def test_the_call_that_completes_a_prompt_of_known_length_is_scored(llama, long_ids):
    looks = Looks(8)
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, gpu_kv_gb=1) as cache:
        cache.expect(Question(prompt_tokens=120, rows=7, looks=looks))
        for part in long_ids[:, :120].split(50, dim=1):
            assert all(layer.rows is None for layer in cache.tiered_layers)
            llama(part, **cache_argument(cache))
        assert {layer.rows.count for layer in cache.tiered_layers} == {7}
        assert looks.question.shape == (7, 13)
        llama(long_ids[:, :1], **cache_argument(cache))
        assert cache.sealed


def test_what_is_expected_does_not_change_while_the_answer_is_decoded(llama, prompt_ids):
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, gpu_kv_gb=1) as cache:
        llama(prompt_ids, **cache_argument(cache))
        cache.seal()
        with pytest.raises(RuntimeError, match="truncate it first"):
            cache.expect(CONTEXT)
        cache.truncate(100)
        cache.expect(CONTEXT)
    assert cache.question is CONTEXT


def test_chunks_are_traced_where_the_question_asks_for_it(llama, long_ids):
    options = {"gpu_kv_gb": 1, "budget_ratio": 0.2, "theta": 2.0, "chunk_tokens": 8}
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, **tier_options(**options)) as cache:
        for trace in (True, False):
            cache.expect(Question(trace=trace))
            llama(long_ids, **cache_argument(cache))
            llama(long_ids[:, :1], **cache_argument(cache))
            found = cache.counters.trace
            assert (len(found) == len(cache.tiered_layers)) if trace else (found is None)
            cache.truncate(0)
