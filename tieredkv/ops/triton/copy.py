"""Copies into the pool: missed chunks and kept tokens from page-locked host memory, and the new token.

The kernels read host memory themselves, so chunk ids need not leave the device. The arena must be page-locked, and the
chunks of a head contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tieredkv.ops.packing import Packing

PROGRAMS = 96
"""Programs of a gather. On an H200 behind PCIe 5, 655 packed chunks of 4 KiB came at 26, 38, 39 and 42 GB/s by 12, 24,
48 and 96 programs of four chunks at a time, at 47 by 96 programs of one; one large copy came at 54."""
PIECES, BLOCK = 1, 1024
"""Chunks that a program copies at a time, and words of each."""


@triton.jit
def _pack(rows, norms):
    """As `packing.pack`: rows `(..., D)` -> numbers `(..., D)` int8 and scales `(..., 1)` float16.

    Bitwise equal to torch on a CPU; torch on a card divides less exactly.
    """
    sized = tl.div_rn(rows.to(tl.float32), norms)
    # Maximum of the bits: a maximum of the numbers would skip NaN.
    bits = tl.max(sized.to(tl.int32, bitcast=True) & 0x7FFFFFFF, len(rows.shape) - 1, keep_dims=True)
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0).to(tl.float16)
    step = scale.to(tl.float32)
    steps = tl.div_rn(sized, tl.where(step == 0.0, 1.1754943508222875e-38, step))  # float32's smallest normal
    number = tl.minimum(tl.maximum(tl.floor(steps + 0.5), -127.0), 127.0)
    return tl.where(steps == steps, number, 0.0).to(tl.int8), scale


@triton.jit
def _copy_words(arena, pool, source, slot, valid, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Copy the chunks that begin at words `source` into slots `slot`, both `(PIECES,)`, where `valid`."""
    word = tl.arange(0, BLOCK)
    for part in range(0, WORDS, BLOCK):
        inside = valid[:, None] & (part + word[None, :] < WORDS)
        data = tl.load(arena + source[:, None] + part + word[None, :], mask=inside, other=0)
        tl.store(pool + slot[:, None] * WORDS + part + word[None, :], data, mask=inside)


@triton.jit
def _copy_packed(
    arena, pool, scales, norms, source, slot, valid,
    C: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Pack the chunks that begin at numbers `source` into slots `slot`, both `(PIECES,)`, where `valid`.

    norms `(PIECES,)`: pointers.
    """
    row, d = tl.arange(0, ROWS), tl.arange(0, PADDED_D)
    for first in range(0, 2 * C, ROWS):
        at = (first + row)[None, :, None]
        counts = valid[:, None, None] & (at < 2 * C)
        inside = counts & (d[None, None, :] < D)
        where = at * D + d[None, None, :]
        data = tl.load(arena + source[:, None, None] + where, mask=inside, other=0.0)
        norm = tl.load(norms[:, None, None] + at // C * D + d[None, None, :], mask=inside, other=1.0)
        numbers, scale = _pack(data, norm)
        tl.store(pool + slot[:, None, None] * (2 * C * D) + where, numbers, mask=inside)
        tl.store(scales + slot[:, None, None] * (2 * C) + at, scale, mask=counts)


def _operands(
    arena: torch.Tensor, pages: torch.Tensor, packing: Packing | None
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], dict[str, int]]:
    """A copy kernel's tensors and sizes. Without packing, chunks are copied as 32-bit words, whatever their dtype."""
    scales, norms = (None, None) if packing is None else (packing.scales, packing.norms)
    source, pool = (arena.view(torch.int32), pages.view(torch.int32)) if packing is None else (arena, pages)
    c, d = source.shape[-2:]
    padded, words = triton.next_power_of_2(d), 2 * c * d
    rows = min(triton.next_power_of_2(2 * c), max(1, 4 * BLOCK // (padded * source.itemsize)))
    sizes = {"C": c, "D": d, "PADDED_D": padded, "ROWS": rows, "BLOCK": min(BLOCK, triton.next_power_of_2(words))}
    return (source, pool, scales, norms), {**sizes, "PIECES": PIECES, "num_warps": 4 if packing is None else 8}


@triton.jit
def _gather(
    arena, pool, scales, norms, heads, missed, victims, misses, slots, chunk_in, slot_of,
    head_count, first_chunk, most, count, slot_stride, chunk_stride, arena_stride,
    C: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
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
            source = row * arena_stride + (first_chunk + chunk).to(tl.int64) * (2 * C * D)
            if norms is None:
                _copy_words(arena, pool, source, slot, valid, 2 * C * D, BLOCK)
            else:
                norm = norms + row * (2 * D) + 0 * piece
                _copy_packed(arena, pool, scales, norm, source, slot, valid, C, D, PADDED_D, ROWS)
            before = tl.load(chunk_in + head * slot_stride + local, mask=valid, other=-1)
            tl.store(slot_of + head * chunk_stride + before, -1, mask=valid & (before >= 0))
            tl.store(chunk_in + head * slot_stride + local, chunk, mask=valid)
            tl.store(slot_of + head * chunk_stride + chunk, local, mask=valid)


def gather(
    arena: torch.Tensor,
    pages: torch.Tensor,
    heads: torch.Tensor,
    missed: torch.Tensor,
    victims: torch.Tensor,
    misses: torch.Tensor,
    slots: torch.Tensor,
    chunk_in: torch.Tensor,
    slot_of: torch.Tensor,
    first_chunk: int,
    packing: Packing | None = None,
) -> None:
    """As `Ops.gather`."""
    operands, sizes = _operands(arena, pages, packing)
    _gather[(PROGRAMS,)](
        *operands, heads, missed, victims, misses, slots, chunk_in, slot_of,
        len(heads), first_chunk, missed.shape[1], slots.shape[1],
        chunk_in.stride(0), slot_of.stride(0), operands[0].stride(0), **sizes,
    )  # fmt: skip


@triton.jit
def _append(
    keys, values, pages, scales, norms, table, lengths, recent_tokens, columns,
    C: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
):  # fmt: skip
    head, d = tl.program_id(0), tl.arange(0, PADDED_D)
    count = tl.load(recent_tokens)
    column, place = count // C, count % C
    slot = tl.load(table + head * columns + column).to(tl.int64)
    target = slot * 2 * C * D + place * D + d
    key = tl.load(keys + head * D + d, mask=d < D, other=0.0)
    value = tl.load(values + head * D + d, mask=d < D, other=0.0)
    if norms is not None:
        norm, scale_of = norms + head * 2 * D + d, scales + slot * 2 * C + place + tl.arange(0, 1)
        key, scale = _pack(key, tl.load(norm, mask=d < D, other=1.0))
        tl.store(scale_of, scale)
        value, scale = _pack(value, tl.load(norm + D, mask=d < D, other=1.0))
        tl.store(scale_of + C, scale)
    tl.store(pages + target, key, mask=d < D)
    tl.store(pages + target + C * D, value, mask=d < D)
    tl.store(lengths + head * columns + column, place + 1)


def append(
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    count: torch.Tensor,
    packing: Packing | None = None,
) -> None:
    """As `Ops.append`."""
    kv_heads, d = keys.shape
    scales, norms = (None, None) if packing is None else (packing.scales, packing.norms)
    _append[(kv_heads,)](
        keys.contiguous(), values.contiguous(), pages, scales, norms, table, lengths, count, table.shape[1],
        C=pages.shape[2], D=d, PADDED_D=triton.next_power_of_2(d),
    )  # fmt: skip


@triton.jit
def _keep(
    arena, pool, scales, norms, head, tokens, slots, count, arena_stride,
    C: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    word, place = tl.arange(0, PADDED), tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    valid = place < count
    token = tl.load(tokens + place, mask=valid, other=0).to(tl.int64)
    slot = tl.load(slots + place // C, mask=valid, other=0).to(tl.int64)
    source = tl.cast(head, tl.int64) * arena_stride + (token // C * 2 * C + token % C) * WIDTH
    target = (slot * 2 * C + place % C) * WIDTH
    inside = valid[:, None] & (word[None, :] < WIDTH)
    for part in range(2):
        where = part * C * WIDTH + word[None, :]
        data = tl.load(arena + source[:, None] + where, mask=inside, other=0)
        if norms is not None:
            norm = norms + (head * 2 + part) * WIDTH + word[None, :]
            data, scale = _pack(data, tl.load(norm, mask=word[None, :] < WIDTH, other=1.0))
            scale_of = scales + (slot * 2 + part) * C + place % C
            tl.store(scale_of[:, None], scale, mask=valid[:, None])
        tl.store(pool + target[:, None] + where, data, mask=inside)


def keep(
    arena: torch.Tensor,
    pages: torch.Tensor,
    head: int,
    tokens: torch.Tensor,
    slots: torch.Tensor,
    packing: Packing | None = None,
) -> None:
    """As `Ops.keep`."""
    if len(tokens) == 0:
        return
    operands, sizes = _operands(arena, pages, packing)
    tokens_at_once = 16
    _keep[(triton.cdiv(len(tokens), tokens_at_once),)](
        *operands, head, tokens.to(pages.device), slots, len(tokens), operands[0].stride(0),
        C=sizes["C"], WIDTH=sizes["D"], PADDED=sizes["PADDED_D"], TOKENS=tokens_at_once,
    )  # fmt: skip


@triton.jit
def _fetch(
    arena, pool, scales, norms, heads, chunks, slots, count, arena_stride,
    C: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    piece = tl.arange(0, PIECES)
    for begin in range(tl.program_id(0) * PIECES, count, tl.num_programs(0) * PIECES):
        valid = begin + piece < count
        row = tl.load(heads + begin + piece, mask=valid, other=0).to(tl.int64)
        chunk = tl.load(chunks + begin + piece, mask=valid, other=0).to(tl.int64)
        slot = tl.load(slots + begin + piece, mask=valid, other=0).to(tl.int64)
        source = row * arena_stride + chunk * (2 * C * D)
        if norms is None:
            _copy_words(arena, pool, source, slot, valid, 2 * C * D, BLOCK)
        else:
            norm = norms + row * (2 * D)
            _copy_packed(arena, pool, scales, norm, source, slot, valid, C, D, PADDED_D, ROWS)


def fetch(
    arena: torch.Tensor,
    pages: torch.Tensor,
    heads: torch.Tensor,
    chunks: torch.Tensor,
    slots: torch.Tensor,
    packing: Packing | None = None,
) -> None:
    """As `Ops.fetch`."""
    if len(chunks) == 0:
        return
    operands, sizes = _operands(arena, pages, packing)
    device = pages.device
    _fetch[(PROGRAMS,)](
        *operands, heads.to(device), chunks.to(device), slots.to(device), len(chunks), operands[0].stride(0), **sizes,
    )  # fmt: skip
