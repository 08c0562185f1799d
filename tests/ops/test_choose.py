"""The choice of chunks and of slots by kernels, at the borders of what their search handles."""

from __future__ import annotations

import pytest
import torch

from tieredkv.ops.base import Listing
from tieredkv.ops.select import TORCH

pytestmark = pytest.mark.interpreter
LARGEST = float(torch.finfo(torch.float32).max)
TINY = 1e-45
"""The least positive number of float32."""


@pytest.fixture(params=["one program", "many programs", "many programs, short blocks"])
def programs(request, monkeypatch):
    """How the chunks of a head are divided."""
    from tieredkv.ops.triton import choose

    if request.param != "one program":
        monkeypatch.setattr(choose, "TILE", 64)
        monkeypatch.setattr(choose, "_parts", lambda chunks, heads, device: max(1, -(-chunks // 64)))
    if request.param == "many programs, short blocks":
        monkeypatch.setattr(choose, "LARGEST_BLOCK", 128)
    return request.param


def rows_of(kind: str, chunks: int) -> torch.Tensor:
    """Ranks `(3, chunks)`."""
    ranks = torch.randn(3, chunks, generator=torch.Generator().manual_seed(chunks))
    if kind == "shares":
        return (8 * ranks).softmax(-1)
    if kind == "few values":
        return ranks.round()
    if kind == "equal":
        return torch.full_like(ranks, -2.0)
    if kind == "signed zeros":
        return torch.where(ranks < 0, -0.0, 0.0) + torch.where(ranks > 2, ranks, 0.0)
    if kind == "extremes":
        odd = torch.tensor([float("inf"), -float("inf"), LARGEST, -LARGEST, TINY, -TINY, 0.0, 1.0])
        return odd[torch.randint(0, len(odd), ranks.shape, generator=torch.Generator().manual_seed(1))]
    return ranks


@pytest.mark.parametrize("kind", ["any", "shares", "few values", "equal", "signed zeros", "extremes"])
@pytest.mark.parametrize("chunks", [1, 65, 300])
def test_the_choice_is_that_of_a_stable_sort(kernels, device, programs, kind, chunks):
    """Of equal ranks the first are chosen, and 0 is equal to -0. Among the counts are none and all."""
    ranks = rows_of(kind, chunks)
    slot_of = torch.where(torch.rand(3, chunks + 1) < 0.5, 1, -1).int()
    selected = torch.tensor([0, min(chunks, 1 + chunks // 7), chunks])
    chosen = torch.full((3, chunks), True, device=device)
    missed, misses = kernels.choose(ranks.to(device), selected.to(device), slot_of.to(device), chunks, chosen)
    best = (-ranks).argsort(dim=1, stable=True)
    for head, count in enumerate(selected.tolist()):
        want = torch.zeros(chunks, dtype=torch.bool)
        want[best[head, :count]] = True
        assert torch.equal(chosen[head].cpu(), want)
        absent = (want & (slot_of[head, :chunks] < 0)).nonzero().flatten().tolist()
        assert int(misses[head]) == len(absent)
        assert missed[head, : len(absent)].tolist() == absent


def test_a_head_that_may_select_more_than_there_is_selects_all(kernels, device, programs):
    chosen, slot_of = torch.zeros(1, 90, dtype=torch.bool, device=device), torch.full((1, 91), -1).int().to(device)
    ranks = torch.randn(1, 90, device=device)
    missed, misses = kernels.choose(ranks, torch.tensor([200], device=device), slot_of, 200, chosen)
    assert bool(chosen.all())
    assert missed[0, :90].tolist() == list(range(90))
    assert misses.tolist() == [90]


@pytest.mark.parametrize("ages", ["any", "equal", "never used", "far apart"])
@pytest.mark.parametrize("needed", [0, 1, 150])
def test_slots_are_taken_in_the_order_of_their_last_use(kernels, device, programs, ages, needed):
    n, chunks, count, step = 2, 700, 400, 90_000
    last_used = {
        "any": torch.randint(step - 50, step, (n, count)),
        "equal": torch.full((n, count), 7),
        "never used": -1 - torch.arange(count).expand(n, count),
        "far apart": torch.where(torch.arange(count) % 3 == 0, 1, step - 1).expand(n, count),
    }[ages].int()
    slots = torch.randperm(n * count).view(n, count).int()
    chunk_in = torch.stack([torch.randperm(chunks)[:count] for _ in range(n)]).int()
    wanted, misses = torch.rand(n, chunks) < 0.3, torch.full((n,), needed, dtype=torch.int32)
    missed = torch.stack([torch.randperm(chunks)[: max(1, needed)] for _ in range(n)]).int()
    order = torch.stack([torch.randperm(chunks) for _ in range(n)]).int()
    found = []
    for ops, where in ((TORCH, torch.device("cpu")), (kernels, device)):
        table, used = torch.zeros(2, 5 + chunks, dtype=torch.int32, device=where), last_used.clone().to(where)
        listing = Listing(table, torch.arange(n, device=where), 5, order.to(where))
        steps, total = torch.full((n,), step - 1).int().to(where), torch.full((n,), 3).to(where)
        victims = ops.place(
            wanted.to(where), wanted.to(where), missed.to(where), misses.to(where), chunk_in.to(where), used,
            slots.to(where), steps, total, listing,
        )  # fmt: skip
        parts = victims[:, :needed], used, table, steps, total
        found.append([part.cpu() for part in parts])
    for want, got in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_the_search_takes_few_reductions(kernels, device, monkeypatch):
    """Of 2,000 ranks: fewer than the 32 bits of a number, whose limit would be searched bit by bit."""
    if device.type != "cpu":
        pytest.skip("counted in the interpreter")
    from triton.runtime.interpreter import ReduceOps

    from tieredkv.ops.triton import choose

    monkeypatch.setattr(choose, "_parts", lambda *_: 1)
    monkeypatch.setattr(choose, "TILE", 4096)
    counted = []
    reduce = ReduceOps.apply_impl
    monkeypatch.setattr(ReduceOps, "apply_impl", lambda self, input: (counted.append(1), reduce(self, input))[1])
    logits = 3 * torch.randn(1, 7, 2000, generator=torch.Generator().manual_seed(0))
    ranks = logits.softmax(-1).mean(1)
    chosen, slot_of = torch.zeros(1, 2000, dtype=torch.bool), torch.full((1, 2001), -1).int()
    kernels.choose(ranks, torch.tensor([100]), slot_of, 100, chosen)
    assert int(chosen.sum()) == 100
    assert 5 < len(counted) <= 20
