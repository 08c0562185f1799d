"""The pool's slots, under random sequences of operations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tieredkv.memory.ledger import DeviceLedger
from tieredkv.memory.pool import DevicePool

CPU = torch.device("cpu")


def make_pool(slots: int) -> DevicePool:
    return DevicePool(DeviceLedger(2**20), slots, 4, 2, torch.float32, CPU)


class PoolMachine(RuleBasedStateMachine):
    """take and give_back in any order never lose, repeat or share a slot."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(12)
        self.owned: list[torch.Tensor] = []

    @rule(count=st.integers(0, 14))
    def take(self, count: int) -> None:
        if count > self.pool.free_slots:
            with pytest.raises(MemoryError):
                self.pool.take(count)
        else:
            self.owned.append(self.pool.take(count))

    @rule(which=st.integers(0, 20))
    def give_back(self, which: int) -> None:
        if self.owned:
            self.pool.give_back(self.owned.pop(which % len(self.owned)))

    @rule(slot=st.integers(0, 11))
    def give_back_what_is_not_taken(self, slot: int) -> None:
        if not any(slot in slots.tolist() for slots in self.owned):
            with pytest.raises(ValueError, match="not all taken"):
                self.pool.give_back(torch.tensor([slot]))

    @invariant()
    def sound(self) -> None:
        self.pool.check_integrity()
        taken = [slot for slots in self.owned for slot in slots.tolist()]
        assert len(set(taken)) == len(taken) == 12 - self.pool.free_slots


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_closing_a_pool_returns_its_bytes():
    pool = make_pool(3)
    assert pool.ledger.used_bytes == 3 * 2 * 4 * 2 * 4
    pool.close()
    assert pool.ledger.used_bytes == 0
