"""The pool's slots and the residency tables, under random sequences of operations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tieredkv.memory.device import DeviceLedger
from tieredkv.memory.pool import DevicePool, Residency

CPU = torch.device("cpu")


def make_pool(slots: int) -> DevicePool:
    return DevicePool(DeviceLedger(2**20), slots, 4, 2, torch.float32, CPU)


class PoolMachine(RuleBasedStateMachine):
    """take and give_back in any order never lose, double or share a slot."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(12)
        self.held: list[torch.Tensor] = []

    @rule(count=st.integers(0, 14))
    def take(self, count: int) -> None:
        if count > self.pool.free_slots:
            with pytest.raises(MemoryError):
                self.pool.take(count)
        else:
            self.held.append(self.pool.take(count))

    @rule(which=st.integers(0, 20))
    def give_back(self, which: int) -> None:
        if self.held:
            self.pool.give_back(self.held.pop(which % len(self.held)))

    @rule(slot=st.integers(0, 11))
    def give_back_what_is_not_taken(self, slot: int) -> None:
        if not any(slot in slots.tolist() for slots in self.held):
            with pytest.raises(ValueError, match="not all taken"):
                self.pool.give_back(torch.tensor([slot]))

    @invariant()
    def sound(self) -> None:
        self.pool.check_integrity()
        taken = [slot for slots in self.held for slot in slots.tolist()]
        assert len(set(taken)) == len(taken) == 12 - self.pool.free_slots


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@st.composite
def admissions(draw: st.DrawFn) -> tuple[int, int, int, list[tuple[list[list[int]], bool]]]:
    """Heads, slots, chunks, and a sequence of (chunk ids per head, whether the last ones stay protected)."""
    heads, slots = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    chunks = draw(st.integers(slots, 12))
    steps = []
    for _ in range(draw(st.integers(1, 12))):
        count = draw(st.integers(1, slots // 2))
        ids = [draw(st.permutations(range(chunks)))[:count] for _ in range(heads)]
        steps.append((ids, draw(st.booleans())))
    return heads, slots, chunks, steps


@given(admissions())
@settings(max_examples=150, deadline=None)
def test_residency_agrees_with_a_dictionary_model(case):
    heads, slots, chunks, steps = case
    residency = Residency(torch.arange(heads * slots).view(heads, slots), chunks)
    held: list[dict[int, int]] = [{} for _ in range(heads)]  # chunk -> local slot
    protected = None
    for clock, (ids, protect) in enumerate(steps):
        wanted = torch.tensor(ids)
        if protected is not None and wanted.shape[1] + protected.shape[1] > slots:
            protected = None
        local, miss = residency.admit(wanted, clock, protected)
        residency.check_integrity()
        for head in range(heads):
            kept = set() if protected is None else set(protected[head].tolist())
            before = dict(held[head])
            for chunk, slot, missed in zip(ids[head], local[head].tolist(), miss[head].tolist(), strict=True):
                assert missed == (chunk not in before)
                assert missed or before[chunk] == slot
                if missed:
                    assert slot not in kept, "a protected slot gave way"
                    assert slot not in {before[c] for c in ids[head] if c in before}, "a wanted chunk gave way"
                    held[head] = {c: s for c, s in held[head].items() if s != slot}
                    held[head][chunk] = slot
            assert {c: s for s, c in enumerate(residency.chunk_in[head].tolist()) if c >= 0} == held[head]
        protected = local if protect else None


def test_the_least_recently_used_chunk_gives_way():
    residency = Residency(torch.arange(3).view(1, 3), 8)
    for clock, chunk in enumerate([0, 1, 2, 0]):
        residency.admit(torch.tensor([[chunk]]), clock)
    local, miss = residency.admit(torch.tensor([[5]]), 4)
    assert bool(miss.all())
    assert residency.chunk_in[0].tolist() == [0, 5, 2]
    assert int(local) == 1


def test_more_chunks_than_may_give_way_are_refused():
    residency = Residency(torch.arange(3).view(1, 3), 8)
    with pytest.raises(ValueError, match="do not fit"):
        residency.admit(torch.tensor([[1, 2]]), 0, protected=torch.tensor([[0, 1]]))


def test_closing_a_pool_returns_its_bytes():
    pool = make_pool(3)
    assert pool.ledger.used_bytes == 3 * 2 * 4 * 2 * 4
    pool.close()
    assert pool.ledger.used_bytes == 0
