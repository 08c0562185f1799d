"""Which chunks a step attends to, and which slots they go to. One program handles one head.

The limit, above which a head's best chunks lie, is found by bisection. The first `BLOCK` ranks stay in registers
meanwhile; longer rows are read again for every bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tieredkv.ops.base import Listing
from tieredkv.ops.triton.variants import bounded

LARGEST_BLOCK = 16384
"""Ranks of a head in registers at most: 16 for each thread of the largest program."""


def _shape(values: int, largest: int) -> dict[str, int]:
    """Launch options of a program that handles rows of `values` numbers, at most `largest` at a time."""
    block = bounded(values, LARGEST_BLOCK // 16, largest)
    return {"BLOCK": block, "num_warps": max(4, min(32, block // 512))}


@triton.jit
def _keys(ranks, chunk, chunks):
    """Ranks as integers in the same order; those that do not exist are the least."""
    bits = tl.load(ranks + chunk, mask=chunk < chunks, other=-float("inf")).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(chunk < chunks, key, -2147483648)


@triton.jit(do_not_specialize=["chunks", "most", "slots_stride"])
def _choose(
    ranks, selected, slot_of, chosen, missed, misses, chunks, most, slots_stride, BLOCK: tl.constexpr
):  # fmt: skip
    head = tl.program_id(0)
    ranks += head.to(tl.int64) * chunks
    count = tl.load(selected + head).to(tl.int32)
    place = tl.arange(0, BLOCK)
    kept = _keys(ranks, place, chunks)
    # Find the rank of the count-th best, bit by bit from the highest.
    limit, bit = tl.full([], -2147483648, tl.int64), tl.full([], 2147483648, tl.int64)
    reached = chunks + 1  # ranks that are not below the limit
    for _ in range(32):
        trial = (limit + bit).to(tl.int32)
        above = tl.sum((kept >= trial).to(tl.int32), 0)
        for first in range(BLOCK, chunks, BLOCK):
            above += tl.sum((_keys(ranks, first + place, chunks) >= trial).to(tl.int32), 0)
        reached = tl.where(above >= count, above, reached)
        limit = tl.where(above >= count, limit + bit, limit)
        bit = bit >> 1
    least = limit.to(tl.int32)
    better = tl.sum((kept > least).to(tl.int32), 0)
    for first in range(BLOCK, chunks, BLOCK):
        better += tl.sum((_keys(ranks, first + place, chunks) > least).to(tl.int32), 0)
    # Of chunks that tie for the last places, take the first.
    equals = tl.zeros([], tl.int32)
    absent = tl.zeros([], tl.int32)
    for first in range(0, chunks, BLOCK):
        chunk = first + place
        exists = chunk < chunks
        key = kept
        if first > 0:
            key = _keys(ranks, chunk, chunks)
        tie = ((key == least) & exists).to(tl.int32)
        order = tl.zeros([BLOCK], tl.int32)
        if reached > count:
            order = equals + tl.cumsum(tie, 0) - tie
            equals += tl.sum(tie, 0)
        taken = exists & ((key > least) | ((tie != 0) & (order < count - better)))
        tl.store(chosen + head * chunks + chunk, taken.to(tl.uint8), mask=exists)
        gone = taken & (tl.load(slot_of + head * slots_stride + chunk, mask=taken, other=0) < 0)
        at = absent + tl.cumsum(gone.to(tl.int32), 0) - 1
        tl.store(missed + head * most + at, chunk, mask=gone)
        absent += tl.sum(gone.to(tl.int32), 0)
    tl.store(misses + head, absent)


def choose(
    ranks: torch.Tensor, selected: torch.Tensor, slot_of: torch.Tensor, most: int, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Ops.choose`. Of equal ranks the first are chosen."""
    heads, chunks = ranks.shape
    missed = torch.empty((heads, most), dtype=torch.int32, device=ranks.device)
    misses = torch.empty((heads,), dtype=torch.int32, device=ranks.device)
    _choose[(heads,)](
        ranks, selected, slot_of, chosen.view(torch.uint8), missed, misses, chunks, most, slot_of.stride(0),
        **_shape(chunks, LARGEST_BLOCK),
    )  # fmt: skip
    return missed, misses


@triton.jit(
    do_not_specialize=["chunks", "most", "count", "stride", "columns", "first"],
    do_not_specialize_on_alignment=["total"],
)
def _place(
    wanted, kept, misses, chunk_in, last_used, slots, step, total, victims, table, heads, listed_in,
    chunks, most, count, stride, columns, first,
    BLOCK: tl.constexpr,
):  # fmt: skip
    head, place = tl.program_id(0), tl.arange(0, BLOCK)
    needed, now = tl.load(misses + head), tl.load(step + head)
    tl.store(total + head, tl.load(total + head) + needed)
    if table is not None:
        now += 1
        tl.store(step + head, now)
    held = _age(kept, chunk_in, last_used, slots, head, place, now, chunks, count, stride)
    # Find the age from which on slots are taken, bit by bit from the highest of any age: slots never used count as
    # used before the first step, one step apart (`Residency.enter`).
    limit, bit = tl.zeros([], tl.int32), tl.full([], 1, tl.int32)
    while bit * 2 <= now + count:
        bit = bit * 2
    while bit > 0:
        above = tl.sum((held >= (limit | bit)).to(tl.int32), 0)
        for begin in range(BLOCK, count, BLOCK):
            age = _age(kept, chunk_in, last_used, slots, head, begin + place, now, chunks, count, stride)
            above += tl.sum((age >= (limit | bit)).to(tl.int32), 0)
        limit = tl.where(above >= needed, limit | bit, limit)
        bit = bit >> 1
    older = tl.sum((held > limit).to(tl.int32), 0)
    for begin in range(BLOCK, count, BLOCK):
        age = _age(kept, chunk_in, last_used, slots, head, begin + place, now, chunks, count, stride)
        older += tl.sum((age > limit).to(tl.int32), 0)
    equals, gone, listed = tl.zeros([], tl.int32), tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for begin in range(0, count, BLOCK):
        slot = begin + place
        age = held
        if begin > 0:
            age = _age(kept, chunk_in, last_used, slots, head, slot, now, chunks, count, stride)
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
        if table is not None:
            at = listed + tl.cumsum(used.to(tl.int32), 0) - 1
            page = tl.load(slots + head * count + slot, mask=used, other=0)
            tl.store(table + tl.load(heads + head) * columns + first + at, page, mask=used)
            if listed_in is not None:
                tl.store(listed_in + head * count + slot, at, mask=used)
            listed += tl.sum(used.to(tl.int32), 0)


@triton.jit
def _age(kept, chunk_in, last_used, slots, head, slot, now, chunks, count, stride):
    """Steps since each slot was last used; -1 for one that must not be taken or does not exist."""
    exists = slot < count
    resident = tl.load(chunk_in + head * stride + slot, mask=exists, other=-1)
    stays = tl.load(kept + head * chunks + resident, mask=resident >= 0, other=0) != 0
    owned = tl.load(slots + head * count + slot, mask=exists, other=-1) >= 0
    used = tl.load(last_used + head * stride + slot, mask=exists, other=0)
    return tl.where(exists & owned & (stays == 0), now - used, -1)


def place(
    wanted: torch.Tensor,
    kept: torch.Tensor,
    misses: torch.Tensor,
    chunk_in: torch.Tensor,
    last_used: torch.Tensor,
    slots: torch.Tensor,
    step: torch.Tensor,
    most: int,
    total: torch.Tensor,
    listing: Listing | None,
) -> torch.Tensor:
    """As `Ops.place`."""
    n, count = slots.shape
    victims = torch.empty((n, most), dtype=torch.int32, device=slots.device)
    where = (None, None, None) if listing is None else (listing.table, listing.heads, listing.columns)
    columns, first = (0, 0) if listing is None else (listing.table.shape[1], listing.first)
    _place[(n,)](
        wanted.view(torch.uint8), kept.view(torch.uint8), misses, chunk_in, last_used, slots, step, total, victims,
        *where, wanted.shape[1], most, count, chunk_in.stride(0), columns, first, **_shape(count, LARGEST_BLOCK // 2),
    )  # fmt: skip
    return victims
