"""The ledger that counts device bytes against the cap."""

from __future__ import annotations

import pytest
import torch

from tieredkv.errors import BudgetError
from tieredkv.memory.ledger import DeviceLedger


def test_peak_is_the_most_ever_used_at_once():
    ledger = DeviceLedger(100)
    ledger.reserve("a", 60)
    ledger.release("a")
    ledger.reserve("b", 40)
    assert (ledger.used_bytes, ledger.peak_bytes, ledger.free_bytes) == (40, 60, 60)


def test_exceeding_the_cap_raises_and_counts_nothing():
    ledger = DeviceLedger(100)
    ledger.reserve("a", 60)
    with pytest.raises(BudgetError, match="41 bytes for b would exceed the device cap"):
        ledger.reserve("b", 41)
    assert ledger.by_purpose() == {"a": 60}


def test_tensors_are_counted_by_their_bytes():
    ledger = DeviceLedger(100)
    tensor = ledger.empty("t", (3, 4), torch.bfloat16, torch.device("cpu"))
    assert ledger.used_bytes == tensor.numel() * 2


def test_scratch_is_released_even_after_an_error():
    ledger = DeviceLedger(100)
    ledger.reserve("s", 10)
    with pytest.raises(RuntimeError), ledger.scratch("s", 50):
        assert ledger.used_bytes == 60
        raise RuntimeError
    assert ledger.by_purpose() == {"s": 10}


def test_scratch_is_released_if_an_interrupt_arrives_when_it_has_just_been_counted():
    class Interrupted(DeviceLedger):
        def reserve(self, purpose: str, nbytes: int) -> None:
            super().reserve(purpose, nbytes)
            raise KeyboardInterrupt

    ledger = Interrupted(100)
    with pytest.raises(KeyboardInterrupt), ledger.scratch("s", 50):
        pass
    assert ledger.by_purpose() == {}
