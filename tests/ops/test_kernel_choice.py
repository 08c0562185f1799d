"""Which chunks are chosen, and which slots give way, by Triton's kernels, against torch."""

from __future__ import annotations

import pytest
import torch

from tieredkv.ops.base import Listing
from tieredkv.ops.select import TORCH

pytestmark = pytest.mark.interpreter


@pytest.fixture(params=["rows fit in a block", "rows are longer than a block"])
def blocks(request, monkeypatch):
    """Rows of some hundred numbers are handled as those of real lengths are, in one block or in several."""
    from tieredkv.ops.triton import choose

    if request.param == "rows are longer than a block":
        monkeypatch.setattr(choose, "LARGEST_BLOCK", 256)


@pytest.mark.parametrize("chunks", [7, 256, 700])
def test_the_best_chunks_are_chosen(kernels, device, blocks, chunks):
    ranks = torch.randn(3, chunks)
    slot_of = torch.where(torch.rand(3, chunks + 1) < 0.5, 1, -1).int()
    selected = torch.tensor([0, 3, 7])
    found = []
    for ops, where in ((TORCH, torch.device("cpu")), (kernels, device)):
        chosen = torch.rand(3, chunks, device=where) < 0.5  # of the step before
        order = torch.full((3, chunks), -7, dtype=torch.int32, device=where)
        missed, misses = ops.choose(ranks.to(where), selected.to(where), slot_of.to(where), 7, chosen, order)
        counted = [missed[head, :count].cpu() for head, count in enumerate(misses.tolist())]
        found.append((chosen.cpu(), torch.cat(counted), misses.cpu(), order.cpu()))
        before = chosen.int().cumsum(1) - chosen.int()
        assert torch.equal(order, torch.where(chosen, before, -7).int())
    for want, got in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_all_of_equal_ranks_may_be_chosen_or_few(kernels, device, blocks):
    ranks = torch.tensor([[-1.0] * 300 + [-2.0] * 300, [0.0] * 299 + [-0.5] * 301], device=device)
    none = torch.full((2, 601), -1, dtype=torch.int32, device=device)
    chosen = torch.ones(2, 600, dtype=torch.bool, device=device)
    missed, misses = kernels.choose(ranks, torch.tensor([280, 300], device=device), none, 300, chosen)
    for head, (count, want) in enumerate([(280, range(280)), (300, range(300))]):
        assert chosen[head].nonzero().flatten().tolist() == list(want)
        assert missed[head, :count].tolist() == list(want)
    assert misses.tolist() == [280, 300]


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "ahead"])
def test_the_slots_longest_unused_give_way(kernels, device, blocks, listed):
    """Tables in the middle of an answer: some slots never used, some kept, some a head does not own."""
    n, chunks, count, step = 2, 900, 600, 37
    slots = torch.randperm(n * count).view(n, count).int()
    slots[1, 500:] = -1
    chunk_in = torch.stack([torch.randperm(chunks)[:count] for _ in range(n)]).int()
    chunk_in[:, ::7] = -1
    chunk_in[1, 500:] = -1
    missed = torch.stack([torch.randperm(chunks)[:200] for _ in range(n)]).int()
    order = torch.stack([torch.randperm(chunks) for _ in range(n)]).int()
    last_used = torch.where(torch.rand(n, count) < 0.3, -1 - torch.arange(count), torch.randint(0, step, (n, count)))
    wanted = torch.rand(n, chunks) < 0.2
    kept = wanted | (torch.rand(n, chunks) < 0.2)
    misses, heads = torch.tensor([190, 170], dtype=torch.int32), torch.tensor([2, 0])
    found = []
    for ops, where in ((TORCH, torch.device("cpu")), (kernels, device)):
        table, used = torch.zeros(3, 4 + chunks, dtype=torch.int32, device=where), last_used.int().to(where)
        steps, total = torch.full((n,), step, dtype=torch.int32, device=where), torch.tensor([5, 6], device=where)
        listing = Listing(table, heads.to(where), 4, order.to(where))
        victims = ops.place(
            wanted.to(where), kept.to(where), missed.to(where), misses.to(where), chunk_in.to(where), used,
            slots.to(where), steps, total, listing if listed else None,
        )  # fmt: skip
        assert steps.tolist() == [step + 1 if listed else step] * n
        assert total.tolist() == [5 + 190, 6 + 170]
        assert int((used == steps.unsqueeze(1)).sum()) >= 190 + 170
        parts = torch.cat([victims[0, :190], victims[1, :170]]), used, table
        found.append(tuple(part.cpu() for part in parts))
    for want, got in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_ties_do_not_change_how_many_chunks_are_chosen(kernels, device):
    ranks = torch.tensor([[0.0, 1.0, 0.0, 0.0, 2.0, 0.0]], device=device)
    none = torch.full((1, 7), -1, dtype=torch.int32, device=device)
    for count, want in ((4, [0, 1, 2, 4]), (5, [0, 1, 2, 3, 4])):
        chosen = torch.ones(1, 6, dtype=torch.bool, device=device)
        missed, misses = kernels.choose(ranks, torch.tensor([count], device=device), none, 5, chosen)
        assert chosen[0].nonzero().flatten().tolist() == want
        assert (missed[0, :count].tolist(), misses.tolist()) == (want, [count])
