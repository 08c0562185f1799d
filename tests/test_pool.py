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
def admissions(draw: st.DrawFn) -> tuple[list[int], int, list[tuple[list[list[int]], bool]]]:
    """Slots of each head, chunks, and a sequence of (chunk ids per head, -1 for none; whether they stay protected)."""
    slots = draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))
    chunks = draw(st.integers(max(slots), 12))
    steps = []
    for _ in range(draw(st.integers(1, 12))):
        counts = [draw(st.integers(0, share // 2)) for share in slots]
        width = max(counts)
        ids = [draw(st.permutations(range(chunks)))[:count] + [-1] * (width - count) for count in counts]
        steps.append(([draw(st.permutations(row)) for row in ids], draw(st.booleans())))
    return slots, chunks, steps


@given(admissions())
@settings(max_examples=200, deadline=None)
def test_residency_agrees_with_a_dictionary_model(case):
    slots, chunks, steps = case
    table = torch.full((len(slots), max(slots)), -1)
    table[torch.arange(max(slots)) < torch.tensor(slots).unsqueeze(1)] = torch.arange(sum(slots))
    residency = Residency(table, chunks)
    held: list[dict[int, int]] = [{} for _ in slots]  # chunk -> local slot
    protected = None
    for clock, (ids, protect) in enumerate(steps):
        local, miss = residency.admit(torch.tensor(ids, dtype=torch.int64), clock, protected)
        residency.check_integrity()
        for head, share in enumerate(slots):
            kept = set() if protected is None else set(protected[head].tolist())
            before = dict(held[head])
            for chunk, slot, missed in zip(ids[head], local[head].tolist(), miss[head].tolist(), strict=True):
                if chunk < 0:
                    assert (slot, missed) == (-1, False)
                    continue
                assert 0 <= slot < share
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
    with pytest.raises(ValueError, match="more chunks wanted than fit"):
        residency.admit(torch.tensor([[1, 2]]), 0, protected=torch.tensor([[0, 1]]))


def test_more_chunks_than_slots_are_refused():
    residency = Residency(torch.arange(2).view(1, 2), 8)
    with pytest.raises(ValueError, match="more chunks wanted than fit"):
        residency.admit(torch.arange(5).view(1, 5), 0)
    assert residency.chunk_in.tolist() == [[-1, -1]], "what was refused left no trace"


def test_closing_a_pool_returns_its_bytes():
    pool = make_pool(3)
    assert pool.ledger.used_bytes == 3 * 2 * 4 * 2 * 4
    pool.close()
    assert pool.ledger.used_bytes == 0
