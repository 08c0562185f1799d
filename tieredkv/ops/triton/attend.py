"""Attention of query tokens over pages that differ from head to head, split over pages and merged by log-sum-exp.

Two launches; with pages of 4 bits three, of which the first turns the queries. Outputs are turned back as they are
merged.

Shapes: `K` KV heads, `G` query heads per KV head, `P` pages of a head, `C` page tokens, `D` head dim.
"""

from __future__ import annotations

from functools import cache, partial

import torch
import triton
import triton.language as tl

from tieredkv.codecs import PLAIN
from tieredkv.codecs.rotated import hadamard
from tieredkv.ops.base import Pages
from tieredkv.ops.triton.records import typed
from tieredkv.ops.triton.turn import WIDTH, turn_queries
from tieredkv.ops.triton.variants import launch

BLOCK_BYTES = 2**14
"""Bytes of keys, and of values, that a program reads at a time: two blocks of each fit any card's shared memory."""
MOST_SPLITS = 64
"""Parts that the pages of a head are divided into: merged as if there were always as many."""
MOST_ROWS = 32
"""Query rows of a KV head in one program."""


@triton.jit
def _low(packed, dtype: tl.constexpr):
    """The numbers in the low bits of bytes."""
    return ((packed & 15).to(tl.float32) - 7.5).to(dtype)


@triton.jit
def _high(packed, dtype: tl.constexpr):
    """The numbers in the high bits of bytes."""
    return ((packed >> 4).to(tl.float32) - 7.5).to(dtype)


@triton.jit(do_not_specialize=["columns", "columns_per_split", "lse_stride"])
def _attend_split(
    query, numbers, scales, norms, constant, table, lengths, out, lse, page_lse,
    scaling, columns, columns_per_split, lse_stride,
    BITS: tl.constexpr, RECORD: tl.constexpr, G: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    PADDED_C: tl.constexpr, PADDED_G: tl.constexpr, PADDED_W: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    head, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    W: tl.constexpr = D // 2 if BITS == 4 else D  # numbers, or bytes of two numbers each, of a key
    row, w, token = tl.arange(0, PADDED_G), tl.arange(0, PADDED_W), tl.arange(0, BLOCK)
    inside = (row[:, None] < G) & (w[None, :] < W)
    q = tl.load(query + (head * G + row[:, None]) * D + w[None, :], mask=inside, other=0.0)
    high_q = q
    if BITS == 4:
        high_q = tl.load(query + (head * G + row[:, None]) * D + W + w[None, :], mask=inside, other=0.0)
    if WIDEN:
        q, high_q = q.to(tl.float32), high_q.to(tl.float32)
    if BITS == 8:
        # Norms and scaling are the same for all keys: multiply them into the query once.
        norm = tl.load(norms + head * 2 * D + w, mask=w < D, other=0.0) * scaling
        q = (q.to(tl.float32) * norm[None, :]).to(q.dtype)
    best = tl.full([PADDED_G], -1e38, tl.float32)
    total = tl.zeros([PADDED_G], tl.float32)
    mixed = tl.zeros([PADDED_G, PADDED_W], tl.float32)
    high_mixed = mixed
    of_page = tl.zeros([PADDED_G], tl.float32)  # so far, of a page that is longer than a block, relative to `best`
    first = split * columns_per_split
    stop = tl.minimum(first + columns_per_split, columns)
    for begin in range(first * PADDED_C, stop * PADDED_C, BLOCK):
        column, place = (begin + token) // PADDED_C, (begin + token) % PADDED_C
        exists = column < stop
        page = tl.load(table + head * columns + column, mask=exists, other=0).to(tl.int64)
        counts = exists & (place < tl.load(lengths + head * columns + column, mask=exists, other=0))
        where = (page * RECORD + place * W)[:, None] + w[None, :]
        readable = counts[:, None] & (w[None, :] < W)
        k = tl.load(numbers + where, mask=readable, other=0)
        v = tl.load(numbers + where + C * W, mask=readable, other=0)
        if BITS == 4:
            logits = tl.dot(q, tl.trans(_low(k, q.dtype)), out_dtype=tl.float32, input_precision="ieee")
            logits = tl.dot(high_q, tl.trans(_high(k, q.dtype)), logits, input_precision="ieee")
        else:
            logits = tl.dot(q, tl.trans(k.to(q.dtype)), out_dtype=tl.float32, input_precision="ieee")
        if BITS == 16:
            logits *= scaling
        else:
            scale_of = scales + page * (RECORD // 2) + C * W + place
            logits *= tl.load(scale_of, mask=counts, other=0.0).to(tl.float32)[None, :]
        logits = tl.where(counts[None, :], logits, -float("inf"))
        better = tl.maximum(best, tl.max(logits, 1))
        weights = tl.exp(logits - better[:, None])
        faded = tl.exp(best - better)
        total = total * faded + tl.sum(weights, 1)
        if page_lse is not None:
            if PADDED_C > BLOCK:
                of_page = tl.where(begin % PADDED_C == 0, 0.0, of_page * faded) + tl.sum(weights, 1)
                masses, column = of_page[:, None], begin // PADDED_C + tl.arange(0, 1)
            else:
                masses = tl.sum(tl.reshape(weights, (PADDED_G, BLOCK // PADDED_C, PADDED_C)), 2)
                column = begin // PADDED_C + tl.arange(0, BLOCK // PADDED_C)
            whole = tl.where(masses > 0, better[:, None] + tl.log(tl.maximum(masses, 1e-38)), -1e38)
            if constant is not None:
                whole += tl.load(constant + head * G + row, mask=row < G, other=0.0)[:, None]
            where = page_lse + (head * G + row[:, None]) * lse_stride + column[None, :]
            tl.store(where, whole, mask=(row[:, None] < G) & (column[None, :] < stop))
        if BITS < 16:
            weights *= tl.load(scale_of + C, mask=counts, other=0.0).to(tl.float32)[None, :]
        weights = weights.to(q.dtype)
        mixed = mixed * faded[:, None]
        if BITS == 4:
            mixed = tl.dot(weights, _low(v, q.dtype), mixed, input_precision="ieee")
            high_mixed = high_mixed * faded[:, None]
            high_mixed = tl.dot(weights, _high(v, q.dtype), high_mixed, input_precision="ieee")
        else:
            mixed = tl.dot(weights, v.to(q.dtype), mixed, input_precision="ieee")
        best = better
    if BITS == 8:
        mixed *= tl.load(norms + (head * 2 + 1) * D + w, mask=w < D, other=0.0)[None, :]
    # An empty split: output 0, lowest possible lse.
    weight = tl.maximum(total, 1e-30)
    whole = tl.where(total > 0, best + tl.log(weight), -1e38)
    target = (head * G + row) * splits + split
    tl.store(out + target[:, None] * D + w[None, :], mixed / weight[:, None], mask=inside)
    if BITS == 4:
        tl.store(out + target[:, None] * D + W + w[None, :], high_mixed / weight[:, None], mask=inside)
    tl.store(lse + target, whole, mask=row < G)


@triton.jit
def _columns(row, turn, d, column, D: tl.constexpr):
    """Entries `column` of `row @ turn`. row: numbers `d`, 0 beyond D."""
    inside = (d[:, None] < D) & (column[None, :] < D)
    return tl.sum(row[:, None] * tl.load(turn + d[:, None] * D + column[None, :], mask=inside, other=0.0), 0)


@triton.jit(do_not_specialize=["splits", "group"])
def _merge_splits(
    parts, part_lse, constant, centre, mirrors, turn, out, lse, splits, group,
    D: tl.constexpr, PADDED_D: tl.constexpr, PADDED_SPLITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    split, d = tl.arange(0, PADDED_SPLITS), tl.arange(0, PADDED_D)
    each = tl.load(part_lse + row * splits + split, mask=split < splits, other=-1e38)
    best = tl.max(each, 0)
    weights = tl.exp(each - best)
    total = tl.sum(weights, 0)
    where = (row * splits + split[:, None]) * D + d[None, :]
    part = tl.load(parts + where, mask=(split[:, None] < splits) & (d[None, :] < D), other=0.0)
    merged = tl.sum(part * weights[:, None], 0) / total
    whole = best + tl.log(total)
    if turn is None:
        tl.store(out + row * D + d, merged, mask=d < D)
    else:
        whole += tl.load(constant + row)
        values = (row // group * 2 + 1) * D
        along = tl.zeros([WIDTH], tl.float32)
        for first in range(0, D, WIDTH):
            column = first + tl.arange(0, WIDTH)
            across = tl.load(mirrors + values + column, mask=column < D, other=0.0)
            along += _columns(merged, turn, d, column, D) * across
        for first in range(0, D, WIDTH):
            column = first + tl.arange(0, WIDTH)
            across = tl.load(mirrors + values + column, mask=column < D, other=0.0)
            mean = tl.load(centre + values + column, mask=column < D, other=0.0)
            turned_back = _columns(merged, turn, d, column, D) - 2 * tl.sum(along, 0) * across
            tl.store(out + row * D + column, turned_back + mean, mask=column < D)
    tl.store(lse + row, whole)


def widened(dtype: torch.dtype) -> bool:
    """Whether to multiply in float32: Triton's interpreter treats bfloat16 as integers."""
    return dtype == torch.bfloat16 and triton.knobs.runtime.interpret


@cache
def programs_for(device: torch.device) -> int:
    """Programs that keep a device busy: two per SM."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def paged_attention(
    query: torch.Tensor,
    pages: Pages,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    batch_pages: int = 0,
    page_lse: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Ops.paged_attention`. What lies beyond a page's length is not read. batch_pages is ignored.

    Multiplies in the pages' dtype, or with pages of fewer bits in the query's.
    """
    heads, n, d = query.shape
    kv_heads, columns = table.shape
    group = heads // kv_heads * n
    if group > MOST_ROWS and n > 1:
        each = max(1, MOST_ROWS * kv_heads // heads)
        some = query.split(each, dim=1)
        split = [paged_attention(part, pages, table, lengths, scaling, dtype=dtype) for part in some]
        return torch.cat([out for out, _ in split], dim=1), torch.cat([lse for _, lse in split], dim=1)
    codec, fit, bits = pages.codec, pages.fit, pages.codec.bits
    numbers, scales = typed(pages)
    channels, centre = (None, None) if fit is None else (fit.channels, fit.centre)
    rows, turn, constant = query.to(numbers.dtype if bits == PLAIN else query.dtype).contiguous(), None, None
    if bits == 4:
        assert fit is not None
        turn = hadamard(d, query.device)
        rows, constant = turn_queries(rows, fit, turn, scaling)
    splits = max(1, min(columns, programs_for(query.device) // kv_heads, MOST_SPLITS))
    empty = partial(torch.empty, dtype=torch.float32, device=query.device)
    parts, part_lse = empty((heads, n, splits, d)), empty((heads, n, splits))
    out, lse = torch.empty((heads, n, d), dtype=dtype, device=query.device), empty((heads, n))
    padded_rows, padded = max(16, triton.next_power_of_2(group)), triton.next_power_of_2(d)
    width = max(16, triton.next_power_of_2(d // 2 if bits == 4 else d))
    token_bytes = width * (2 if bits == 4 else numbers.itemsize)
    if rows.dtype == torch.float32:  # less fits in registers, above all of unpacked numbers, which live there
        token_bytes *= padded_rows // 16 * (1 if bits == PLAIN else 8)
    block = min(128, max(16, BLOCK_BYTES // token_bytes))
    launch(
        _attend_split, (kv_heads, splits),
        rows, numbers, scales, channels, constant, table, lengths, parts, part_lse, page_lse,
        scaling, columns, triton.cdiv(columns, splits), 0 if page_lse is None else page_lse.stride(0),
        BITS=bits, RECORD=numbers.shape[1], G=group, C=codec.chunk_tokens, D=d,
        PADDED_C=triton.next_power_of_2(codec.chunk_tokens), PADDED_G=padded_rows, PADDED_W=width, BLOCK=block,
        WIDEN=widened(rows.dtype), num_stages=2,
    )  # fmt: skip
    launch(
        _merge_splits, (heads * n,),
        parts, part_lse, constant, centre, channels, turn, out, lse, splits, group,
        D=d, PADDED_D=padded, PADDED_SPLITS=MOST_SPLITS, WIDTH=WIDTH,
    )  # fmt: skip
    return out, lse
