"""Which chunks a step attends to, and which slots they go to.

A head's chunks are chosen from a limit on, which is searched between its least and its largest rank, until as many lie
above it as are wanted: each time, all threads of a program count the ranks above two trials. The first `BLOCK` ranks
stay in registers meanwhile; longer rows are read again. Several programs find the limit of the same head, and each
lists the choice among its part of the chunks: none waits for another, and a card has more processors than a layer has
heads. Slots are taken by one program a head, as it writes the ages that it reads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tieredkv.ops.base import Listing
from tieredkv.ops.triton import attend
from tieredkv.ops.triton.variants import bounded, launch

LARGEST_BLOCK = 16384
"""Ranks of a head in registers at most: 16 for each thread of the largest program."""
TILE = 1024
"""Chunks or slots that a program lists at a time."""


def _shape(values: int, largest: int, tile: int) -> dict[str, int]:
    """Launch options of a program that handles rows of `values` numbers, at most `largest` at a time, and lists what it
    found `tile` at a time."""
    block = bounded(values, LARGEST_BLOCK // 16, largest)
    return {"BLOCK": block, "TILE": min(tile, block), "num_warps": max(4, min(32, block // 512))}


def _parts(chunks: int, heads: int, device: torch.device) -> int:
    """Programs for each head: together one for each processor of the card, or as many as there are tiles."""
    return min(triton.cdiv(chunks, TILE), max(1, attend.programs_for(device) // 2 // heads))


@triton.jit
def _keys(ranks, chunk, chunks):
    """Ranks as integers in the same order, -0 as 0; those that do not exist are the least."""
    rank = tl.load(ranks + chunk, mask=chunk < chunks, other=-float("inf"))
    bits = (rank + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(chunk < chunks, key, -2147483648)


@triton.jit
def _least_and_largest(kept, ranks, chunks, BLOCK: tl.constexpr):
    """Of all keys of a row."""
    place = tl.arange(0, BLOCK)
    least = tl.min(tl.where(place < chunks, kept, 2147483647), 0)
    largest = tl.max(kept, 0)
    for first in range(BLOCK, chunks, BLOCK):
        key = _keys(ranks, first + place, chunks)
        least = tl.minimum(least, tl.min(tl.where(first + place < chunks, key, 2147483647), 0))
        largest = tl.maximum(largest, tl.max(key, 0))
    return least.to(tl.int64), largest.to(tl.int64)


@triton.jit
def _from(keys, lower, upper):
    """How many keys are at least `lower`, and how many at least `upper`, which is no less: in one reduction."""
    both = tl.sum(tl.where(keys >= upper, 65537, tl.where(keys >= lower, 1, 0)), 0)
    return both & 65535, both >> 16


@triton.jit
def _narrowed(limit, reached, above, better, lower, upper, counts, wanted):
    """The search after two trials. From `limit` on there are `reached` keys, at least as many as are wanted; from
    `above` on fewer, `better`. counts: of the keys from `lower` and from `upper` on."""
    at_lower, at_upper = counts[0] >= wanted, counts[1] >= wanted
    below = tl.where(at_lower, tl.where(at_upper, above, upper), lower)
    fewer = tl.where(at_lower, tl.where(at_upper, better, counts[1]), counts[0])
    limit = tl.where(at_upper, upper, tl.where(at_lower, lower, limit))
    reached = tl.where(at_upper, counts[1], tl.where(at_lower, counts[0], reached))
    return limit, reached, below, fewer


@triton.jit
def _ties(kept, ranks, chunks, least, stop, BLOCK: tl.constexpr):
    """How many keys of chunks before `stop` are `least`."""
    place = tl.arange(0, BLOCK)
    found = tl.sum(((kept == least) & (place < stop)).to(tl.int32), 0)
    for first in range(BLOCK, stop, BLOCK):
        key = _keys(ranks, first + place, chunks)
        found += tl.sum(((key == least) & (first + place < stop)).to(tl.int32), 0)
    return found


@triton.jit
def _taken(key, chunk, least, stop, end, slot_of):
    """Which chunks before `end` are chosen, and which of these have no slot."""
    taken = (chunk < end) & ((key > least) | ((key == least) & (chunk < stop)))
    return taken, taken & (tl.load(slot_of + chunk, mask=taken, other=0) < 0)


@triton.jit(do_not_specialize=["chunks", "most", "slots_stride", "part_chunks"])
def _choose(
    ranks, selected, slot_of, chosen, order, missed, misses, chunks, most, slots_stride, part_chunks,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head, begin = tl.program_id(0), tl.program_id(1) * part_chunks
    ranks += head.to(tl.int64) * chunks
    count = tl.load(selected + head).to(tl.int32)
    place = tl.arange(0, BLOCK)
    kept = _keys(ranks, place, chunks)
    limit, largest = _least_and_largest(kept, ranks, chunks, BLOCK)
    above, reached, better = largest + 1, chunks, tl.zeros([], tl.int32)
    if count == 0:
        limit, reached = above, better
    while (above - limit > 1) & (reached > count):
        lower = limit + (above - limit + 2) // 3
        upper = tl.minimum(2 * lower - limit, above - 1)
        counts = _from(kept, lower.to(tl.int32), upper.to(tl.int32))
        for first in range(BLOCK, chunks, BLOCK):
            key = _keys(ranks, first + place, chunks)
            more = _from(key, lower.to(tl.int32), upper.to(tl.int32))
            counts = (counts[0] + more[0], counts[1] + more[1])
        limit, reached, above, better = _narrowed(limit, reached, above, better, lower, upper, counts, count)
    least = limit.to(tl.int32)
    # Of chunks that tie for the last places, take the first: those before `stop`.
    low, stop = tl.zeros([], tl.int32), chunks
    while (stop - low > 1) & (reached > count):
        trial = low + (stop - low) // 2
        found = better + _ties(kept, ranks, chunks, least, trial, BLOCK)
        enough = found >= count
        stop, reached = tl.where(enough, trial, stop), tl.where(enough, found, reached)
        low = tl.where(enough, low, trial)
    slot_of += head * slots_stride
    taken, gone = _taken(kept, place, least, stop, begin, slot_of)
    listed, absent = tl.sum(taken.to(tl.int32), 0), tl.sum(gone.to(tl.int32), 0)  # by earlier parts
    for first in range(BLOCK, begin, BLOCK):
        taken, gone = _taken(_keys(ranks, first + place, chunks), first + place, least, stop, begin, slot_of)
        listed += tl.sum(taken.to(tl.int32), 0)
        absent += tl.sum(gone.to(tl.int32), 0)
    end = tl.minimum(begin + part_chunks, chunks)
    for first in range(begin, end, TILE):  # names of their own, as these tensors have another shape
        chunk = first + tl.arange(0, TILE)
        own, lacking = _taken(_keys(ranks, chunk, chunks), chunk, least, stop, end, slot_of)
        tl.store(chosen + head * chunks + chunk, own.to(tl.uint8), mask=chunk < end)
        both = lacking.to(tl.int32) + own.to(tl.int32) * 65536  # counted in one scan
        before = tl.cumsum(both, 0) - both
        tl.store(missed + head * most + absent + (before & 65535), chunk, mask=lacking)
        if order is not None:
            tl.store(order + head * chunks + chunk, listed + (before >> 16), mask=own)
        of_tile = tl.sum(both, 0)
        absent += of_tile & 65535
        listed += of_tile >> 16
    if end == chunks:
        tl.store(misses + head, absent)


def choose(
    ranks: torch.Tensor,
    selected: torch.Tensor,
    slot_of: torch.Tensor,
    most: int,
    chosen: torch.Tensor,
    order: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Ops.choose`. Of equal ranks the first are chosen."""
    heads, chunks = ranks.shape
    missed = torch.empty((heads, most), dtype=torch.int32, device=ranks.device)
    misses = torch.empty((heads,), dtype=torch.int32, device=ranks.device)
    part = triton.cdiv(chunks, _parts(chunks, heads, ranks.device))
    launch(
        _choose, (heads, triton.cdiv(chunks, part)),
        ranks, selected, slot_of, chosen.view(torch.uint8), order, missed, misses,
        chunks, most, slot_of.stride(0), part,
        **_shape(chunks, LARGEST_BLOCK, TILE),
    )  # fmt: skip
    return missed, misses


@triton.jit(
    do_not_specialize=["chunks", "most", "count", "stride", "columns", "first"],
    do_not_specialize_on_alignment=["total"],
)
def _place(
    wanted, kept, missed, misses, chunk_in, last_used, slots, step, total, victims, table, heads, order,
    chunks, most, count, stride, columns, first,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head, place = tl.program_id(0), tl.arange(0, BLOCK)
    needed, now = tl.load(misses + head), tl.load(step + head)
    tl.store(total + head, tl.load(total + head) + needed)
    if table is not None:
        now += 1
    held = _age(kept, chunk_in, last_used, slots, head, place, now, chunks, count, stride)
    above, limit, older = tl.max(held, 0), tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for begin in range(BLOCK, count, BLOCK):
        age = _age(kept, chunk_in, last_used, slots, head, begin + place, now, chunks, count, stride)
        above = tl.maximum(above, tl.max(age, 0))
    above, reached = above + 1, count
    if needed == 0:
        limit, reached = above, needed
    while (above - limit > 1) & (reached > needed):
        lower = limit + (above - limit + 2) // 3
        upper = tl.minimum(2 * lower - limit, above - 1)
        counts = _from(held, lower, upper)
        for begin in range(BLOCK, count, BLOCK):
            age = _age(kept, chunk_in, last_used, slots, head, begin + place, now, chunks, count, stride)
            more = _from(age, lower, upper)
            counts = (counts[0] + more[0], counts[1] + more[1])
        limit, reached, above, older = _narrowed(limit, reached, above, older, lower, upper, counts, needed)
    equals, gone = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for begin in range(0, count, TILE):
        slot = begin + tl.arange(0, TILE)
        age = _age(kept, chunk_in, last_used, slots, head, slot, now, chunks, count, stride)
        victim = age >= limit
        if reached > needed:  # of slots that tie for the last places, take the first
            tie = (age == limit).to(tl.int32)
            older_before = older + equals + tl.cumsum(tie, 0) - tie
            victim = (age > limit) | ((tie != 0) & (older_before < needed))
            equals += tl.sum(tie, 0)
        resident = tl.load(chunk_in + head * stride + slot, mask=slot < count, other=-1)
        used = victim | (tl.load(wanted + head * chunks + resident, mask=resident >= 0, other=0) != 0)
        tl.store(last_used + head * stride + slot, now, mask=used)
        taken = victim.to(tl.int32)
        at = gone + tl.cumsum(taken, 0) - taken
        tl.store(victims + head * most + at, slot, mask=victim)
        if table is not None:
            new = tl.load(missed + head * most + at, mask=victim, other=0)
            column = tl.load(order + head * chunks + tl.where(victim, new, resident), mask=used, other=0)
            page = tl.load(slots + head * count + slot, mask=used, other=0)
            tl.store(table + tl.load(heads + head) * columns + first + column, page, mask=used)
        gone += tl.sum(taken, 0)
    if table is not None:
        tl.debug_barrier()  # not before all threads have read it
        tl.store(step + head, now)


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
    missed: torch.Tensor,
    misses: torch.Tensor,
    chunk_in: torch.Tensor,
    last_used: torch.Tensor,
    slots: torch.Tensor,
    step: torch.Tensor,
    total: torch.Tensor,
    listing: Listing | None,
) -> torch.Tensor:
    """As `Ops.place`."""
    (n, count), most = slots.shape, missed.shape[1]
    victims = torch.empty((n, most), dtype=torch.int32, device=slots.device)
    where = (None, None, None) if listing is None else (listing.table, listing.heads, listing.order)
    columns, first = (0, 0) if listing is None else (listing.table.shape[1], listing.first)
    launch(
        _place, (n,),
        wanted.view(torch.uint8), kept.view(torch.uint8), missed, misses, chunk_in, last_used, slots, step, total,
        victims, *where, wanted.shape[1], most, count, chunk_in.stride(0), columns, first,
        **_shape(count, LARGEST_BLOCK // 2, 2 * TILE),
    )  # fmt: skip
    return victims
