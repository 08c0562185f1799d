"""Which chunks a step attends to, and which slots they go to: what `Residency` does, without the host.

Shapes: `n` dynamic heads, `N` chunks, `R` retrieval slots of a head, `m` chunks a head may select at most.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048
LONG = tl.constexpr(2**30)
"""More than any clock shows."""


@triton.jit
def _ordered(x):
    """Floats as whole numbers from 0 to 2**32 - 1 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, (~bits).to(tl.int64), bits.to(tl.int64) + 2147483648)


@triton.jit
def _choose(
    ranks, selected, slot_of, chosen, missed, misses, chunks, most, slots_stride, BLOCK: tl.constexpr
):  # fmt: skip
    head = tl.program_id(0)
    count = tl.load(selected + head).to(tl.int32)
    place = tl.arange(0, BLOCK)
    # The rank of the count-th best, bit by bit from the top.
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
    # Of those that tie for the last places, the first.
    equals = tl.zeros([], tl.int32)
    absent = tl.zeros([], tl.int32)
    for first in range(0, chunks, BLOCK):
        chunk = first + place
        there = chunk < chunks
        rank = _ordered(tl.load(ranks + head * chunks + chunk, mask=there, other=-float("inf")))
        tie = ((rank == limit) & there).to(tl.int32)
        order = equals + tl.cumsum(tie, 0) - tie
        taken = there & ((rank > limit) | ((tie != 0) & (order < count - better)))
        equals += tl.sum(tie, 0)
        tl.store(chosen + head * chunks + chunk, taken.to(tl.uint8), mask=there)
        gone = taken & (tl.load(slot_of + head * slots_stride + chunk, mask=taken, other=0) < 0)
        at = absent + tl.cumsum(gone.to(tl.int32), 0) - 1
        tl.store(missed + head * most + at, chunk, mask=gone)
        absent += tl.sum(gone.to(tl.int32), 0)
    tl.store(misses + head, absent)


def choose(ranks: torch.Tensor, selected: torch.Tensor, slot_of: torch.Tensor, most: int) -> tuple[torch.Tensor, ...]:
    """As `memory.residency.choose`: the best `selected` chunks of each head, and those of them that are in no slot.

    ranks `(n, N)`, selected `(n,)`, slot_of `(n, N)`, -1 for none. Returns chosen `(n, N)` bool, missed `(n, most)`
    chunk ids, ascending, of which the first misses `(n,)` count.
    """
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
    wanted, kept, misses, chunk_in, last_used, slots, clock, victims, table, heads,
    chunks, most, count, stride, columns, first,
    TABLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, place = tl.program_id(0), tl.arange(0, BLOCK)
    needed, now = tl.load(misses + head), tl.load(clock)
    # How long ago the oldest slots were used that must give way, bit by bit: larger is longer ago.
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
        held = tl.load(chunk_in + head * stride + slot, mask=slot < count, other=-1)
        used = victim | (tl.load(wanted + head * chunks + held, mask=held >= 0, other=0) != 0)
        tl.store(last_used + head * stride + slot, now, mask=used)
        if TABLE:
            at = listed + tl.cumsum(used.to(tl.int32), 0) - 1
            page = tl.load(slots + head * count + slot, mask=used, other=0)
            tl.store(table + row * columns + first + at, page, mask=used)
            listed += tl.sum(used.to(tl.int32), 0)


@triton.jit
def _age(kept, chunk_in, last_used, slots, head, slot, chunks, count, stride):
    """How long ago each slot was used, the larger the longer; -1 for one that must not give way or is not there."""
    there = slot < count
    held = tl.load(chunk_in + head * stride + slot, mask=there, other=-1)
    stays = tl.load(kept + head * chunks + held, mask=held >= 0, other=0) != 0
    owned = tl.load(slots + head * count + slot, mask=there, other=-1) >= 0
    used = tl.load(last_used + head * stride + slot, mask=there, other=0)
    return tl.where(there & owned & (stays == 0), LONG - used, -1)


def place(
    wanted: torch.Tensor,
    kept: torch.Tensor,
    misses: torch.Tensor,
    chunk_in: torch.Tensor,
    last_used: torch.Tensor,
    slots: torch.Tensor,
    clock: torch.Tensor,
    most: int,
    table: torch.Tensor | None,
    heads: torch.Tensor,
    first: int,
) -> torch.Tensor:
    """As `memory.residency.place`: slots for the missed chunks; marks used slots and lists them in the page table.

    wanted `(n, N)`: chunks whose slots are used now; kept `(n, N)`: chunks whose slots must not give way, the wanted
    among them. misses `(n,)`. chunk_in, last_used `(n, R)`: read, and `clock` `(1,)` written where a slot is used.
    slots `(n, R)`: of the pool, -1 for none. Victims are the slots used longest ago, the first of those used equally
    long ago. table `(K, P)` int32: gets the pool slots of a head's wanted chunks from column `first` of row `heads` on.
    Returns victims `(n, most)`, local slots, ascending, of which the first `misses` count.
    """
    n, count = slots.shape
    victims = torch.empty((n, most), dtype=torch.int32, device=slots.device)
    listed = slots if table is None else table
    _place[(n,)](
        wanted.view(torch.uint8), kept.view(torch.uint8), misses, chunk_in, last_used, slots, clock, victims,
        listed, heads, wanted.shape[1], most, count, chunk_in.stride(0), listed.shape[1], first,
        TABLE=table is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return victims
