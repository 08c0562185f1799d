"""Residency tables under random sequences of steps, in torch and in kernels, against a dictionary per head."""

from __future__ import annotations

import pytest
import torch

from tieredkv.ops import torch_ops

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tieredkv.memory.arena import MemoryArena
from tieredkv.memory.host import HostLayer
from tieredkv.memory.residency import Residency
from tieredkv.ops.base import Listing, Pages

U8 = torch.uint8


def filled(heads: int, chunks: int, generator: torch.Generator, device: torch.device) -> HostLayer:
    """A layer of random tokens, page-locked for a card."""
    host = HostLayer(heads, 8, 4, torch.float32)
    host.append(*torch.randn(2, heads, 4 * chunks, 8, generator=generator))
    records = host.chunks()
    arena = MemoryArena.of(records.pin_memory() if device.type == "cuda" else records.clone())
    host.adopt(arena, host.length, host.codec, None)
    return host


@st.composite
def sequences(draw: st.DrawFn) -> tuple[list[int], list[int], int, int, list[tuple[bool, bool]]]:
    """Slots and selected chunks of each head, number of chunks, seed, and per step: same ranks again? copies ahead?"""
    slots = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    selected = [draw(st.integers(0, most)) for most in slots]
    chunks = draw(st.integers(max(slots), 20))
    steps = draw(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=5))
    return slots, selected, chunks, draw(st.integers(0, 2**16)), steps


class Model:
    """One head's slots: chunk -> local slot, and when each slot was last used."""

    def __init__(self, slots: int) -> None:
        self.slot_of: dict[int, int] = {}
        self.used = dict.fromkeys(range(slots), -1)

    def admit(self, wanted: list[int], kept: list[int], step: int) -> tuple[list[int], list[int]]:
        """Missed chunks and the slots they get."""
        missed = [chunk for chunk in wanted if chunk not in self.slot_of]
        busy = {self.slot_of[chunk] for chunk in kept if chunk in self.slot_of}
        oldest = sorted((when, slot) for slot, when in self.used.items() if slot not in busy)[: len(missed)]
        victims = sorted(slot for _, slot in oldest)
        for chunk, slot in zip(missed, victims, strict=True):
            self.slot_of = {c: s for c, s in self.slot_of.items() if s != slot} | {chunk: slot}
        for chunk in wanted:
            self.used[self.slot_of[chunk]] = step
        return missed, victims


@given(sequences())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_steps_agree_with_a_dictionary_of_each_head(ops, device, case):
    slots, selected, chunks, seed, steps = case
    n, heads, first = len(slots), torch.arange(len(slots)) * 2, 2
    generator = torch.Generator().manual_seed(seed)
    source = filled(2 * n, chunks + 3, generator, device)
    pages = Pages(source.codec, torch.zeros(sum(slots) + 3, source.codec.chunk_bytes, dtype=U8, device=device), None)
    owned = torch.full((n, max(slots)), -1)
    owned[torch.arange(max(slots)) < torch.tensor(slots).unsqueeze(1)] = torch.randperm(sum(slots), generator=generator)
    index, most = Residency(owned.to(device), chunks), max(slots)
    table = torch.zeros((2 * n, most + 1), dtype=torch.int32, device=device)
    rows, count = heads.to(device), torch.tensor(selected, device=device)
    models = [Model(each) for each in slots]
    ranks = torch.rand(n, chunks, generator=generator)
    step = torch.zeros(n, dtype=torch.int32, device=device)
    missed_in_all, begun = torch.zeros(n, dtype=torch.int64, device=device), 0
    listing = Listing(table, rows, 1, torch.full((n, chunks), -1, dtype=torch.int32, device=device))

    def enter(asked: torch.Tensor, kept: torch.Tensor | None, listed: Listing | None) -> torch.Tensor:
        want = torch.ones(n, chunks, dtype=torch.bool, device=device)
        missed, misses = ops.choose(ranks.to(device), asked, index.slot_of, most, want, listed and listed.order)
        stay = want if kept is None else want | kept
        used, before = (index.chunk_in, index.last_used, index.slots), missed_in_all.clone()
        victims = ops.place(want, stay, missed, misses, *used, step, missed_in_all, listed)
        assert torch.equal(missed_in_all, before + misses)
        assert step.tolist() == [begun] * n
        for head, model in enumerate(models):
            best = sorted(ranks[head].topk(int(asked[head])).indices.tolist())
            assert want[head].nonzero().flatten().tolist() == best
            gone, to = model.admit(best, stay[head].nonzero().flatten().tolist(), begun)
            assert missed[head, : int(misses[head])].tolist() == gone
            assert victims[head, : int(misses[head])].tolist() == to
            assert index.last_used[head, : slots[head]].tolist() == list(model.used.values())
        tables = index.slots, index.chunk_in, index.slot_of
        ops.gather(source, pages, rows, missed, victims, misses, *tables, first)
        return want

    for like_before, ahead in steps:
        begun += 1
        fresh = torch.rand(n, chunks, generator=generator)
        ranks = ranks * 0.9 + fresh * 0.1 if like_before else fresh
        chosen = enter(count, None, listing)
        for head, model in enumerate(models):
            pool_slots = [int(owned[head, model.slot_of[c]]) for c in chosen[head].nonzero().flatten().tolist()]
            assert table[heads[head], 1 : 1 + selected[head]].tolist() == pool_slots
        if ahead:
            spare = (torch.tensor(slots, device=device) - count).clamp(max=2)
            ranks = torch.rand(n, chunks, generator=generator)
            enter(torch.minimum(spare, torch.tensor(most, device=device)), chosen, None)
        index.check_integrity()
        for head, model in enumerate(models):
            assert {c: s for c, s in enumerate(index.slot_of[head, :-1].tolist()) if s >= 0} == model.slot_of
            for chunk, slot in model.slot_of.items():
                assert torch.equal(pages.records[owned[head, slot]].cpu(), source.records[heads[head], chunk + first])


def test_chunks_entered_first_are_replaced_last():
    index = Residency(torch.tensor([[4, 7, 9], [2, 3, -1]]), 8)
    index.enter(torch.tensor([[5, 0, 2], [1, 6, 7]]))
    index.check_integrity()
    assert index.chunk_in.tolist() == [[5, 0, 2], [1, 6, -1]]
    none = torch.zeros(2, 8, dtype=torch.bool)
    used, step = (index.chunk_in, index.last_used, index.slots), torch.ones(2, dtype=torch.int32)
    missed, misses = torch.zeros((2, 2), dtype=torch.int32), torch.tensor([2, 1], dtype=torch.int32)
    victims = torch_ops.place(none, none, missed, misses, *used, step, torch.zeros(2, dtype=torch.int64), None)
    assert victims[0].tolist() == [1, 2]
    assert victims[1, :1].tolist() == [1]


def test_more_misses_than_replaceable_slots_are_refused():
    index = Residency(torch.arange(3).view(1, 3), 8)
    index.enter(torch.tensor([[0, 1, 2]]))
    kept = torch.arange(8).view(1, 8) < 2
    used, step = (index.chunk_in, index.last_used, index.slots), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="more chunks are missed than slots may be taken"):
        missed = torch.zeros((1, 3), dtype=torch.int32)
        torch_ops.place(kept, kept, missed, torch.tensor([2]), *used, step, torch.zeros(1, dtype=torch.int64), None)


def test_chunks_are_fetched_to_their_slots(ops, device):
    source = filled(2, 3, torch.Generator().manual_seed(0), device)
    pages = Pages(source.codec, torch.zeros(6, source.codec.chunk_bytes, dtype=U8, device=device), None)
    ops.fetch(source, pages, torch.tensor([1, 0]), torch.tensor([2, 1]), torch.tensor([5, 0], device=device))
    assert torch.equal(pages.records[5].cpu(), source.records[1, 2])
    assert torch.equal(pages.records[0].cpu(), source.records[0, 1])
    assert not pages.records[1:5].any()


def test_fetching_no_chunks_does_nothing(ops, device):
    source, none = filled(1, 1, torch.Generator(), device), torch.empty(0, dtype=torch.int64)
    pages = Pages(source.codec, torch.zeros(1, source.codec.chunk_bytes, dtype=U8, device=device), None)
    ops.fetch(source, pages, none, none, none.to(device))
    assert not pages.records.any()
