"""Which chunks a step attends to, and which slots they go to. One program handles one head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048
LONG = tl.constexpr(2**30)
"""Above any number of a step."""


@triton.jit
def _ordered(x):
    """Map floats to integers from 0 to 2**32 - 1, keeping their order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, (~bits).to(tl.int64), bits.to(tl.int64) + 2147483648)


@triton.jit
def _choose(
    ranks, selected, slot_of, chosen, missed, misses, chunks, most, slots_stride, BLOCK: tl.constexpr
):  # fmt: skip
    head = tl.program_id(0)
    count = tl.load(selected + head).to(tl.int32)
    place = tl.arange(0, BLOCK)
    # Find the rank of the count-th best, bit by bit from the highest.
    limit, bit = tl.zeros([], tl.int64), tl.full([], 2147483648, tl.int64)
    for _ in range(32):
        above = tl.zeros([BLOCK], tl.int32)
        for first in range(0, chunks, BLOCK):
            chunk = first + place
            rank = _ordered(tl.load(ranks + head * chunks + chunk, mask=chunk < chunks, other=-float("inf")))
            above += ((rank >= (limit | bit)) & (chunk < chunks)).to(tl.int32)
        limit = tl.where(tl.sum(above, 0) >= count, limit | bit, limit)
        bit = bit >> 1
    better = tl.zeros([], tl.int32)
    for first in range(0, chunks, BLOCK):
        chunk = first + place
        rank = _ordered(tl.load(ranks + head * chunks + chunk, mask=chunk < chunks, other=-float("inf")))
        better += tl.sum(((rank > limit) & (chunk < chunks)).to(tl.int32), 0)
    # Of chunks that tie for the last places, take the first.
    equals = tl.zeros([], tl.int32)
    absent = tl.zeros([], tl.int32)
    for first in range(0, chunks, BLOCK):
        chunk = first + place
        exists = chunk < chunks
        rank = _ordered(tl.load(ranks + head * chunks + chunk, mask=exists, other=-float("inf")))
        tie = ((rank == limit) & exists).to(tl.int32)
        order = equals + tl.cumsum(tie, 0) - tie
        taken = exists & ((rank > limit) | ((tie != 0) & (order < count - better)))
        equals += tl.sum(tie, 0)
        tl.store(chosen + head * chunks + chunk, taken.to(tl.uint8), mask=exists)
        gone = taken & (tl.load(slot_of + head * slots_stride + chunk, mask=taken, other=0) < 0)
        at = absent + tl.cumsum(gone.to(tl.int32), 0) - 1
        tl.store(missed + head * most + at, chunk, mask=gone)
        absent += tl.sum(gone.to(tl.int32), 0)
    tl.store(misses + head, absent)


def choose(
    ranks: torch.Tensor, selected: torch.Tensor, slot_of: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `Ops.choose`. Of equal ranks the first are chosen."""
    heads, chunks = ranks.shape
    chosen = torch.empty((heads, chunks), dtype=torch.bool, device=ranks.device)
    missed = torch.empty((heads, most), dtype=torch.int32, device=ranks.device)
    misses = torch.empty((heads,), dtype=torch.int32, device=ranks.device)
    _choose[(heads,)](
        ranks,
        selected,
        slot_of,
        chosen.view(torch.uint8),
        missed,
        misses,
        chunks,
        most,
        slot_of.stride(0),
        BLOCK=BLOCK,
        num_warps=8,
    )
    return chosen, missed, misses


@triton.jit
def _place(
    wanted, kept, misses, chunk_in, last_used, slots, step, victims, table, heads,
    chunks, most, count, stride, columns, first,
    TABLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, place = tl.program_id(0), tl.arange(0, BLOCK)
    needed, now = tl.load(misses + head), tl.load(step)
    # Find the age at which slots are taken, bit by bit from the highest.
    limit, bit = tl.zeros([], tl.int32), tl.full([], 1 << 30, tl.int32)
    for _ in range(31):
        above = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, count, BLOCK):
            age = _age(kept, chunk_in, last_used, slots, head, begin + place, chunks, count, stride)
            above += (age >= (limit | bit)).to(tl.int32)
        limit = tl.where(tl.sum(above, 0) >= needed, limit | bit, limit)
        bit = bit >> 1
    older = tl.zeros([], tl.int32)
    for begin in range(0, count, BLOCK):
        age = _age(kept, chunk_in, last_used, slots, head, begin + place, chunks, count, stride)
        older += tl.sum((age > limit).to(tl.int32), 0)
    equals, gone, listed = tl.zeros([], tl.int32), tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    row = tl.load(heads + head)
    for begin in range(0, count, BLOCK):
        slot = begin + place
        age = _age(kept, chunk_in, last_used, slots, head, slot, chunks, count, stride)
        tie = (age == limit).to(tl.int32)
        order = equals + tl.cumsum(tie, 0) - tie
        victim = (age > limit) | ((tie != 0) & (order < needed - older))
        equals += tl.sum(tie, 0)
        at = gone + tl.cumsum(victim.to(tl.int32), 0) - 1
        tl.store(victims + head * most + at, slot, mask=victim)
        gone += tl.sum(victim.to(tl.int32), 0)
        resident = tl.load(chunk_in + head * stride + slot, mask=slot < count, other=-1)
        used = victim | (tl.load(wanted + head * chunks + resident, mask=resident >= 0, other=0) != 0)
        tl.store(last_used + head * stride + slot, now, mask=used)
        if TABLE:
            at = listed + tl.cumsum(used.to(tl.int32), 0) - 1
            page = tl.load(slots + head * count + slot, mask=used, other=0)
            tl.store(table + row * columns + first + at, page, mask=used)
            listed += tl.sum(used.to(tl.int32), 0)


@triton.jit
def _age(kept, chunk_in, last_used, slots, head, slot, chunks, count, stride):
    """Time since each slot was last used, larger for longer; -1 for one that must not be taken or does not exist."""
    exists = slot < count
    resident = tl.load(chunk_in + head * stride + slot, mask=exists, other=-1)
    stays = tl.load(kept + head * chunks + resident, mask=resident >= 0, other=0) != 0
    owned = tl.load(slots + head * count + slot, mask=exists, other=-1) >= 0
    used = tl.load(last_used + head * stride + slot, mask=exists, other=0)
    return tl.where(exists & owned & (stays == 0), LONG - used, -1)


def place(
    wanted: torch.Tensor,
    kept: torch.Tensor,
    misses: torch.Tensor,
    chunk_in: torch.Tensor,
    last_used: torch.Tensor,
    slots: torch.Tensor,
    step: torch.Tensor,
    most: int,
    table: torch.Tensor | None,
    heads: torch.Tensor,
    first: int,
) -> torch.Tensor:
    """As `Ops.place`."""
    n, count = slots.shape
    victims = torch.empty((n, most), dtype=torch.int32, device=slots.device)
    listed = slots if table is None else table
    _place[(n,)](
        wanted.view(torch.uint8), kept.view(torch.uint8), misses, chunk_in, last_used, slots, step, victims,
        listed, heads, wanted.shape[1], most, count, chunk_in.stride(0), listed.shape[1], first,
        TABLE=table is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return victims
