"""The cache of recent records: what it finds, and what gives way."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tieredkv.memory.record_cache import RecordCache

HEADS, CHUNKS, BYTES = 3, 20, 8


def record_of(heads, chunks):
    """A record that tells whose it is."""
    rows = torch.from_numpy(np.asarray(heads) * 100 + np.asarray(chunks)).to(torch.uint8)
    return rows.unsqueeze(1).expand(-1, BYTES)


def cache_of(slots):
    cache = RecordCache(torch.zeros((slots, BYTES), dtype=torch.uint8), HEADS)
    cache.reserve(CHUNKS)
    return cache


def request(cache, heads, chunks):
    """Ask for records, add what is missing; which were found."""
    heads, chunks = np.array(heads), np.array(chunks)
    slots = cache.find(heads, chunks)
    here = slots >= 0
    assert torch.equal(cache.memory[torch.from_numpy(slots[here])], record_of(heads[here], chunks[here]))
    cache.add(heads[~here], chunks[~here], record_of(heads[~here], chunks[~here]))
    cache.check_integrity()
    return here.tolist()


def test_a_record_is_found_once_it_was_added():
    cache = cache_of(4)
    assert request(cache, [1], [7]) == [False]
    assert request(cache, [1, 2], [7, 7]) == [True, False]


def test_what_was_asked_for_less_often_gives_way():
    cache = cache_of(2)
    for chunk in (1, 1, 2, 3, 3):
        request(cache, [0], [chunk])
    assert request(cache, [0, 0], [1, 3]) == [True, True]
    assert request(cache, [0], [2]) == [False]


def test_what_was_asked_for_as_often_stays():
    """Or one pass over many records would leave none that was asked for before."""
    cache = cache_of(2)
    request(cache, [0, 0], [1, 2])
    for chunk in range(3, CHUNKS):
        request(cache, [0], [chunk])
    assert request(cache, [0, 0], [1, 2]) == [True, True]


def test_of_those_asked_for_as_often_the_least_recently_used_gives_way():
    cache = cache_of(2)
    for chunk in (1, 2, 3, 3):
        request(cache, [0], [chunk])
    assert request(cache, [0, 0], [2, 3]) == [True, True]


def test_what_was_asked_for_often_once_gives_way_in_the_end():
    cache = cache_of(1)
    for _ in range(50):
        request(cache, [0], [1])
    for _ in range(100):
        request(cache, [0], [2])
    assert request(cache, [0], [2]) == [True]


def test_what_a_request_found_is_not_given_away_by_it():
    cache = cache_of(3)
    request(cache, [0, 0, 0], [1, 2, 3])
    request(cache, [0, 0, 0, 0], [1, 2, 4, 5])
    assert request(cache, [0, 0], [1, 2]) == [True, True]


def test_a_request_larger_than_the_cache_fills_it():
    cache = cache_of(3)
    request(cache, [0] * 8, range(8))
    assert sum(request(cache, [0] * 8, range(8))) == 3


def test_dropped_chunks_are_not_found():
    cache = cache_of(6)
    request(cache, [0, 1, 2, 0], [4, 4, 5, 6])
    cache.drop(4, 6)
    cache.check_integrity()
    assert request(cache, [0, 1, 2, 0], [4, 4, 5, 6]) == [False, False, False, True]


def test_it_takes_chunks_that_come_later():
    cache = cache_of(4)
    request(cache, [2], [CHUNKS - 1])
    cache.reserve(CHUNKS + 10)
    assert request(cache, [2, 2], [CHUNKS - 1, CHUNKS + 9]) == [True, False]


@pytest.mark.parametrize("nbytes", [0, 1_000, 10_000, 123_456])
def test_it_takes_no_more_memory_than_it_was_sized_for(nbytes):
    slots = RecordCache.slots_for(nbytes, HEADS, 5_000, 64)
    cache = RecordCache(torch.zeros((slots, 64), dtype=torch.uint8), HEADS)
    cache.reserve(5_000)
    if slots:
        cache.find(np.arange(1), np.arange(1))
        cache.add(np.arange(1), np.arange(1), torch.zeros((1, 64), dtype=torch.uint8))
        assert cache.nbytes <= nbytes


def test_it_has_no_more_slots_than_there_are_records():
    assert RecordCache.slots_for(10**9, HEADS, CHUNKS, BYTES) == HEADS * CHUNKS


keys = st.lists(st.tuples(st.integers(0, HEADS - 1), st.integers(0, CHUNKS - 1)), min_size=1, max_size=12, unique=True)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.lists(keys, max_size=12))
def test_it_is_full_of_what_was_asked_for(slots, requests):
    cache, asked = cache_of(slots), set()
    for each in requests:
        heads, chunks = zip(*each, strict=True)
        request(cache, heads, chunks)
        asked.update(each)
    held = [key for key in asked if cache.find(np.array([key[0]]), np.array([key[1]]))[0] >= 0]
    assert len(held) == min(slots, len(asked))
