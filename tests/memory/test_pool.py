"""The pool's slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tieredkv.codecs import PLAIN, codec_for
from tieredkv.memory.ledger import DeviceLedger
from tieredkv.memory.pool import DevicePool

CPU = torch.device("cpu")


def make_pool(slots: int) -> DevicePool:
    return DevicePool(DeviceLedger(2**20), slots, codec_for(PLAIN, 4, 2, torch.float32), CPU)


@given(st.lists(st.integers(0, 14), max_size=12))
def test_no_slot_is_taken_twice_and_none_is_lost(counts):
    pool, taken = make_pool(12), []
    for count in counts:
        if count > 12 - len(taken):
            with pytest.raises(MemoryError, match=f"{12 - len(taken)} are free"):
                pool.take(count)
        else:
            taken += pool.take(count)
    taken += pool.take(12 - len(taken))
    assert sorted(taken) == list(range(12))


def test_closing_a_pool_returns_its_bytes():
    pool = make_pool(3)
    assert pool.ledger.used_bytes == 3 * 2 * 4 * 2 * 4
    pool.close()
    assert pool.ledger.used_bytes == 0
