"""Copies into the pool: missed chunks and kept tokens from page-locked host memory, and the new token.

The kernels read host memory themselves, so chunk ids need not leave the device. The source's records must be
page-locked, and its heads whole records apart. Records are copied as they are, whatever their codec, or encoded to 8
bits on the way if they are plain.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tieredkv.codecs import PLAIN
from tieredkv.codecs.base import Codec
from tieredkv.codecs.rotated import hadamard
from tieredkv.ops.base import Pages, Source
from tieredkv.ops.triton.records import typed
from tieredkv.ops.triton.turn import WIDTH, turned
from tieredkv.ops.triton.variants import launch

PROGRAMS = 96
"""Programs of a gather. On an H200 behind PCIe 5, 655 chunks of 4 KiB, encoded on the way, came at 26, 38, 39 and 42
GB/s by 12, 24, 48 and 96 programs of four chunks at a time, at 47 by 96 programs of one; one large copy came at 54."""
PIECES, BLOCK = 1, 1024
"""Chunks that a program copies at a time, and words of each."""
TOKENS = 16
"""Single tokens that a program copies."""


@triton.jit
def _most(rows):
    """The largest size in rows `(..., D)` float32, `(..., 1)`, as the bits of a float32.

    A maximum of the numbers would skip NaN, whose bits are above all others.
    """
    return tl.max(rows.to(tl.int32, bitcast=True) & 0x7FFFFFFF, len(rows.shape) - 1, keep_dims=True)


@triton.jit
def _scale(most, largest: tl.constexpr):
    """The scale, float16, by which the numbers of a row go up to `largest`."""
    return tl.div_rn(most.to(tl.float32, bitcast=True), largest).to(tl.float16)


@triton.jit
def _numbers(rows, scale, largest: tl.constexpr, offset: tl.constexpr):
    """Rows in steps of a scale, from `-largest` to `largest`, with `offset` added and rounded, halves up: float32."""
    step = scale.to(tl.float32)
    steps = tl.div_rn(rows, tl.where(step == 0.0, 1.1754943508222875e-38, step)) + offset  # float32's smallest normal
    number = tl.minimum(tl.maximum(tl.floor(steps + 0.5), offset - largest), offset + largest)
    return tl.where(steps == steps, number, 0.0)


@triton.jit
def _pack(rows, norms):
    """As `codecs.packed.pack`: rows `(..., D)` -> numbers `(..., D)` int8 and scales `(..., 1)` float16.

    Bitwise equal to torch on a CPU; torch on a card divides less exactly.
    """
    sized = tl.div_rn(rows.to(tl.float32), norms)
    scale = _scale(_most(sized), 127.0)
    return _numbers(sized, scale, 127.0, 0.0).to(tl.int8), scale


@triton.jit
def _copy_words(arena, pool, record, slot, valid, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Copy records number `record` into slots `slot`, both `(PIECES,)`, where `valid`."""
    word = tl.arange(0, BLOCK)
    for part in range(0, WORDS, BLOCK):
        inside = valid[:, None] & (part + word[None, :] < WORDS)
        data = tl.load(arena + record[:, None] * WORDS + part + word[None, :], mask=inside, other=0)
        tl.store(pool + slot[:, None] * WORDS + part + word[None, :], data, mask=inside)


@triton.jit
def _copy_packed(
    arena, pool, scales, norms, record, slot, valid,
    RECORD: tl.constexpr, C: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Pack records number `record` into slots `slot`, both `(PIECES,)`, where `valid`.

    norms `(PIECES,)`: pointers. RECORD: bytes of a page.
    """
    row, d = tl.arange(0, ROWS), tl.arange(0, PADDED_D)
    for first in range(0, 2 * C, ROWS):
        at = (first + row)[None, :, None]
        counts = valid[:, None, None] & (at < 2 * C)
        inside = counts & (d[None, None, :] < D)
        where = at * D + d[None, None, :]
        data = tl.load(arena + record[:, None, None] * (2 * C * D) + where, mask=inside, other=0.0)
        norm = tl.load(norms[:, None, None] + at // C * D + d[None, None, :], mask=inside, other=1.0)
        numbers, scale = _pack(data, norm)
        tl.store(pool + slot[:, None, None] * RECORD + where, numbers, mask=inside)
        tl.store(scales + slot[:, None, None] * (RECORD // 2) + C * D + at, scale, mask=counts)


def _operands(source: Source, pages: Pages) -> tuple[tuple[Any, ...], dict[str, int]]:
    """What kernels that copy chunks take: source, pool, the pool's scales and norms; and sizes.

    Between records of one codec these are 32-bit words, without scales and norms.
    """
    arena, codec = source.records, pages.codec
    assert arena is not None
    c, d, record = codec.chunk_tokens, codec.head_dim, codec.chunk_bytes
    sizes = {"RECORD": record, "C": c, "D": d, "PIECES": PIECES}
    if source.codec.bits == codec.bits:
        words = record // 4
        sizes |= {"PADDED_D": 1, "ROWS": 1, "BLOCK": min(BLOCK, triton.next_power_of_2(words)), "num_warps": 4}
        return (arena.view(torch.int32), pages.records.view(torch.int32), None, None), sizes
    assert (source.codec.bits, codec.bits) == (PLAIN, 8)
    assert pages.fit is not None
    padded = triton.next_power_of_2(d)
    rows = min(triton.next_power_of_2(2 * c), max(1, 4 * BLOCK // (padded * codec.dtype.itemsize)))
    sizes |= {"PADDED_D": padded, "ROWS": rows, "BLOCK": 1, "num_warps": 8}
    return (arena.view(codec.dtype), *typed(pages), pages.fit.channels), sizes


def _capacity(source: Source) -> int:
    """Records from one head of the source to the next."""
    assert source.records is not None
    return source.records.stride(0) // source.codec.chunk_bytes


@triton.jit(do_not_specialize=["head_count", "first_chunk", "most", "count", "slot_stride", "chunk_stride", "capacity"])
def _gather(
    arena, pool, scales, norms, heads, missed, victims, misses, slots, chunk_in, slot_of,
    head_count, first_chunk, most, count, slot_stride, chunk_stride, capacity,
    RECORD: tl.constexpr, C: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    piece, groups = tl.arange(0, PIECES), 0
    for head in range(head_count):
        absent = tl.load(misses + head)
        row = tl.load(heads + head).to(tl.int64)
        turn = (program + programs - groups % programs) % programs  # each head begins where the one before ended
        groups += (absent + PIECES - 1) // PIECES
        for begin in range(turn * PIECES, absent, programs * PIECES):
            j = begin + piece
            valid = j < absent
            chunk = tl.load(missed + head * most + j, mask=valid, other=0)
            local = tl.load(victims + head * most + j, mask=valid, other=0)
            slot = tl.load(slots + head * count + local, mask=valid, other=0).to(tl.int64)
            record = row * capacity + first_chunk + chunk
            if norms is None:
                _copy_words(arena, pool, record, slot, valid, RECORD // 4, BLOCK)
            else:
                norm = norms + row * (2 * D) + 0 * piece
                _copy_packed(arena, pool, scales, norm, record, slot, valid, RECORD, C, D, PADDED_D, ROWS)
            before = tl.load(chunk_in + head * slot_stride + local, mask=valid, other=-1)
            tl.store(slot_of + head * chunk_stride + before, -1, mask=valid & (before >= 0))
            tl.store(chunk_in + head * slot_stride + local, chunk, mask=valid)
            tl.store(slot_of + head * chunk_stride + chunk, local, mask=valid)


def gather(
    source: Source,
    pages: Pages,
    heads: torch.Tensor,
    missed: torch.Tensor,
    victims: torch.Tensor,
    misses: torch.Tensor,
    slots: torch.Tensor,
    chunk_in: torch.Tensor,
    slot_of: torch.Tensor,
    first_chunk: int,
) -> None:
    """As `Ops.gather`."""
    operands, sizes = _operands(source, pages)
    launch(
        _gather, (PROGRAMS,),
        *operands, heads, missed, victims, misses, slots, chunk_in, slot_of,
        len(heads), first_chunk, missed.shape[1], slots.shape[1],
        chunk_in.stride(0), slot_of.stride(0), _capacity(source), **sizes,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "capacity"])
def _fetch(
    arena, pool, scales, norms, heads, chunks, slots, count, capacity,
    RECORD: tl.constexpr, C: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    piece = tl.arange(0, PIECES)
    for begin in range(tl.program_id(0) * PIECES, count, tl.num_programs(0) * PIECES):
        valid = begin + piece < count
        row = tl.load(heads + begin + piece, mask=valid, other=0).to(tl.int64)
        chunk = tl.load(chunks + begin + piece, mask=valid, other=0).to(tl.int64)
        slot = tl.load(slots + begin + piece, mask=valid, other=0).to(tl.int64)
        record = row * capacity + chunk
        if norms is None:
            _copy_words(arena, pool, record, slot, valid, RECORD // 4, BLOCK)
        else:
            norm = norms + row * (2 * D)
            _copy_packed(arena, pool, scales, norm, record, slot, valid, RECORD, C, D, PADDED_D, ROWS)


def fetch(source: Source, pages: Pages, heads: torch.Tensor, chunks: torch.Tensor, slots: torch.Tensor) -> None:
    """As `Ops.fetch`."""
    if len(chunks) == 0:
        return
    operands, sizes = _operands(source, pages)
    device = pages.records.device
    where = (part.to(device, torch.int64, non_blocking=True) for part in (heads, chunks, slots))
    launch(
        _fetch, (PROGRAMS,),
        *operands, *where, len(chunks), _capacity(source), **sizes,
    )  # fmt: skip


@triton.jit(do_not_specialize=["columns"])
def _append(
    keys, values, pool, scales, channels, centre, turn, table, lengths, recent_tokens, columns,
    BITS: tl.constexpr, RECORD: tl.constexpr, C: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    head, part = tl.program_id(0), tl.program_id(1)
    count = tl.load(recent_tokens + head * 2 + part)
    column, place = count // C, count % C
    slot = tl.load(table + head * columns + column).to(tl.int64)
    at, stored = tl.arange(0, PADDED), tl.arange(0, 1)
    token = keys + head * D
    if part == 1:
        token = values + head * D
    W: tl.constexpr = D // 2 if BITS == 4 else D
    inside, own = at < W, (head * 2 + part) * D
    if BITS == 4:
        low = turned(token, centre + own, channels + own, turn, at, inside, D, PADDED, WIDTH)
        high = turned(token, centre + own, channels + own, turn + W, at, inside, D, PADDED, WIDTH)
        scale = _scale(tl.maximum(_most(low), _most(high)), 7.5)
        low, high = _numbers(low, scale, 7.5, 7.5), _numbers(high, scale, 7.5, 7.5)
        numbers = (low.to(tl.int32) | (high.to(tl.int32) << 4)).to(tl.uint8)
    elif BITS == 8:
        row = tl.load(token + at, mask=inside, other=0.0)
        numbers, scale = _pack(row, tl.load(channels + own + at, mask=inside, other=1.0))
    else:
        numbers = tl.load(token + at, mask=inside, other=0.0)
    row = part * C + place
    tl.store(pool + slot * RECORD + row * W + at, numbers, mask=inside)
    if BITS < 16:
        tl.store(scales + slot * (RECORD // 2) + C * W + row + stored, scale)
    tl.store(lengths + head * columns + column, place + 1)
    tl.debug_barrier()  # not before all threads have read it
    tl.store(recent_tokens + head * 2 + part, count + 1)


def append(
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: Pages,
    table: torch.Tensor,
    lengths: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """As `Ops.append`."""
    kv_heads, d = keys.shape
    codec, bits, fit = pages.codec, pages.codec.bits, pages.fit
    pool, scales = typed(pages)
    channels, centre = (None, None) if fit is None else (fit.channels, fit.centre)
    turn = hadamard(d, keys.device) if bits == 4 else None
    launch(
        _append, (kv_heads, 2),
        keys.contiguous(), values.contiguous(), pool, scales, channels, centre, turn, table, lengths, count,
        table.shape[1],
        BITS=bits, RECORD=pool.shape[1], C=codec.chunk_tokens, D=d,
        PADDED=triton.next_power_of_2(d // 2 if bits == 4 else d), WIDTH=WIDTH,
    )  # fmt: skip


@triton.jit
def _copy_field(source, target, valid, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Copy WIDTH bytes from each pointer in `source` to that in `target`, where `valid`."""
    byte = tl.arange(0, PADDED)
    inside = valid[:, None] & (byte[None, :] < WIDTH)
    tl.store(
        target[:, None] + byte[None, :], tl.load(source[:, None] + byte[None, :], mask=inside, other=0), mask=inside
    )


@triton.jit(do_not_specialize=["head", "count", "capacity"])
def _keep(
    arena, pool, head, tokens, slots, count, capacity,
    FIELDS: tl.constexpr, RECORD: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    valid = place < count
    token = tl.load(tokens + place, mask=valid, other=0).to(tl.int64)
    slot = tl.load(slots + place // C, mask=valid, other=0).to(tl.int64)
    source = arena + (tl.cast(head, tl.int64) * capacity + token // C) * RECORD
    target = pool + slot * RECORD
    for field in tl.static_range(len(FIELDS)):
        first, width = FIELDS[field][0], FIELDS[field][1]
        _copy_field(
            source + first + token % C * width, target + first + place % C * width, valid,
            FIELDS[field][1], FIELDS[field][2],
        )  # fmt: skip


@triton.jit(do_not_specialize=["head", "count", "capacity"])
def _keep_packed(
    arena, pool, scales, norms, head, tokens, slots, count, capacity,
    RECORD: tl.constexpr, C: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    d, place = tl.arange(0, PADDED_D), tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    valid = place < count
    token = tl.load(tokens + place, mask=valid, other=0).to(tl.int64)
    slot = tl.load(slots + place // C, mask=valid, other=0).to(tl.int64)
    record = tl.cast(head, tl.int64) * capacity + token // C
    inside = valid[:, None] & (d[None, :] < D)
    for part in range(2):
        source = record * (2 * C * D) + (part * C + token % C) * D
        row = tl.load(arena + source[:, None] + d[None, :], mask=inside, other=0.0)
        norm = tl.load(norms + (head * 2 + part) * D + d[None, :], mask=d[None, :] < D, other=1.0)
        numbers, scale = _pack(row, norm)
        at = part * C + place % C
        tl.store(pool + (slot * RECORD + at * D)[:, None] + d[None, :], numbers, mask=inside)
        tl.store(scales + (slot * (RECORD // 2) + C * D + at)[:, None], scale, mask=valid[:, None])


def _layout(codec: Codec) -> tuple[tuple[int, int, int], ...]:
    """Of each field of a record: its first byte, the bytes of a token, and these as a power of two."""
    fields = codec.fields(torch.empty(codec.chunk_bytes, dtype=torch.uint8, device="cpu"))
    widths = [field.shape[-1] * field.itemsize for field in fields]
    firsts = [int(field.storage_offset()) * field.itemsize for field in fields]
    return tuple((first, width, triton.next_power_of_2(width)) for first, width in zip(firsts, widths, strict=True))


def keep(source: Source, pages: Pages, head: int, tokens: torch.Tensor, slots: torch.Tensor) -> None:
    """As `Ops.keep`."""
    if len(tokens) == 0:
        return
    grid = (triton.cdiv(len(tokens), TOKENS),)
    token, slot = (part.to(pages.records.device, torch.int64, non_blocking=True) for part in (tokens, slots))
    which, record = (head, token, slot, len(tokens), _capacity(source)), pages.codec.chunk_bytes
    if source.codec.bits == pages.codec.bits:
        launch(
            _keep, grid,
            source.records, pages.records, *which,
            FIELDS=_layout(pages.codec), RECORD=record, C=pages.codec.chunk_tokens, TOKENS=TOKENS,
        )  # fmt: skip
        return
    operands, sizes = _operands(source, pages)
    names = ("RECORD", "C", "D", "PADDED_D")
    launch(_keep_packed, grid, *operands, *which, **{name: sizes[name] for name in names}, TOKENS=TOKENS)
