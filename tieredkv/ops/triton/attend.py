"""Attention of query tokens over pages that differ from head to head, split over pages and merged by log-sum-exp.

Shapes: `K` KV heads, `G` query heads per KV head, `P` pages of a head, `C` page tokens, `D` head dim.
"""

from __future__ import annotations

from functools import cache, partial

import torch
import triton
import triton.language as tl

from tieredkv.ops.packing import Packing
from tieredkv.ops.torch_ops import write_page_lse

BLOCK_BYTES = 2**14
"""Bytes of keys, and of values, that a program reads at a time: two blocks of each fit any card's shared memory."""
MOST_ROWS = 32
"""Query rows of a KV head in one program."""


@triton.jit
def _attend_split(
    query, pages, scales, norms, table, lengths, out, lse, page_lse, scaling, columns, columns_per_split, lse_stride,
    G: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    PADDED_G: tl.constexpr, PADDED_D: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    head, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, d, token = tl.arange(0, PADDED_G), tl.arange(0, PADDED_D), tl.arange(0, BLOCK)
    inside = (row[:, None] < G) & (d[None, :] < D)
    q = tl.load(query + (head * G + row[:, None]) * D + d[None, :], mask=inside, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    if norms is not None:
        # Norms and scaling are the same for all keys: multiply them into the query once.
        norm = tl.load(norms + head * 2 * D + d, mask=d < D, other=0.0) * scaling
        q = (q.to(tl.float32) * norm[None, :]).to(q.dtype)
    best = tl.full([PADDED_G], -1e38, tl.float32)
    total = tl.zeros([PADDED_G], tl.float32)
    mixed = tl.zeros([PADDED_G, PADDED_D], tl.float32)
    first = split * columns_per_split
    stop = tl.minimum(first + columns_per_split, columns)
    for begin in range(first * C, stop * C, BLOCK):
        column, place = (begin + token) // C, (begin + token) % C
        exists = column < stop
        page = tl.load(table + head * columns + column, mask=exists, other=0).to(tl.int64)
        counts = exists & (place < tl.load(lengths + head * columns + column, mask=exists, other=0))
        where = (page * 2 * C + place)[:, None] * D + d[None, :]
        readable = counts[:, None] & (d[None, :] < D)
        k = tl.load(pages + where, mask=readable, other=0.0)
        v = tl.load(pages + where + C * D, mask=readable, other=0.0)
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        if norms is not None:
            k, v = k.to(q.dtype), v.to(q.dtype)
            scale_of = scales + page * 2 * C + place
            key_scale = tl.load(scale_of, mask=counts, other=0.0).to(tl.float32)
            value_scale = tl.load(scale_of + C, mask=counts, other=0.0).to(tl.float32)
        logits = tl.dot(q, tl.trans(k), out_dtype=tl.float32, input_precision="ieee")
        if norms is None:
            logits *= scaling
        else:
            logits *= key_scale[None, :]
        logits = tl.where(counts[None, :], logits, -float("inf"))
        if page_lse is not None:
            of_page = tl.reshape(logits, (PADDED_G, BLOCK // C, C))
            most = tl.maximum(tl.max(of_page, 2), -1e38)
            whole = most + tl.log(tl.sum(tl.exp(of_page - most[:, :, None]), 2))
            column = begin // C + tl.arange(0, BLOCK // C)
            where = page_lse + (head * G + row[:, None]) * lse_stride + column[None, :]
            tl.store(where, tl.maximum(whole, -1e38), mask=(row[:, None] < G) & (column[None, :] < stop))
        better = tl.maximum(best, tl.max(logits, 1))
        weights = tl.exp(logits - better[:, None])
        faded = tl.exp(best - better)
        total = total * faded + tl.sum(weights, 1)
        mixed = mixed * faded[:, None]
        if norms is not None:
            weights *= value_scale[None, :]
        mixed += tl.dot(weights.to(v.dtype), v, out_dtype=tl.float32, input_precision="ieee")
        best = better
    if norms is not None:
        mixed *= tl.load(norms + (head * 2 + 1) * D + d, mask=d < D, other=0.0)[None, :]
    # An empty split: output 0, lowest possible lse.
    mixed = mixed / tl.maximum(total, 1e-30)[:, None]
    whole = tl.where(total > 0, best + tl.log(tl.maximum(total, 1e-30)), -1e38)
    target = (head * G + row) * splits + split
    tl.store(out + target[:, None] * D + d[None, :], mixed, mask=inside)
    tl.store(lse + target, whole, mask=row < G)


@triton.jit
def _merge_splits(
    parts, part_lse, out, lse, splits, D: tl.constexpr, PADDED_D: tl.constexpr, PADDED_SPLITS: tl.constexpr
):  # fmt: skip
    head = tl.program_id(0)
    split, d = tl.arange(0, PADDED_SPLITS), tl.arange(0, PADDED_D)
    each = tl.load(part_lse + head * splits + split, mask=split < splits, other=-1e38)
    best = tl.max(each, 0)
    weights = tl.exp(each - best)
    total = tl.sum(weights, 0)
    where = (head * splits + split[:, None]) * D + d[None, :]
    part = tl.load(parts + where, mask=(split[:, None] < splits) & (d[None, :] < D), other=0.0)
    tl.store(out + head * D + d, tl.sum(part * weights[:, None], 0) / total, mask=d < D)
    tl.store(lse + head, best + tl.log(total))


def widened(dtype: torch.dtype) -> bool:
    """Whether to multiply in float32: Triton's interpreter treats bfloat16 as integers."""
    return dtype == torch.bfloat16 and triton.knobs.runtime.interpret


@cache
def programs_for(device: torch.device) -> int:
    """Programs that keep a device busy: two per SM."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def paged_attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    batch_pages: int = 0,
    packing: Packing | None = None,
    page_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Ops.paged_attention`. What lies beyond a page's length is not read. batch_pages is ignored.

    Multiplies in the pages' dtype, or with packed pages in the query's. `page_lse` takes a
    second pass over the keys, by torch, where pages are not a power of two of tokens or more than a program reads.
    """
    heads, n, d = query.shape
    kv_heads, columns = table.shape
    group = heads // kv_heads * n
    if group > MOST_ROWS and n > 1:
        each = max(1, MOST_ROWS * kv_heads // heads)
        split = [
            paged_attention(part, pages, table, lengths, scaling, packing=packing) for part in query.split(each, dim=1)
        ]
        return torch.cat([out for out, _ in split], dim=1), torch.cat([lse for _, lse in split], dim=1)
    scales, norms = (None, None) if packing is None else (packing.scales, packing.norms)
    dtype = pages.dtype if packing is None else query.dtype
    splits = max(1, min(columns, programs_for(query.device) // kv_heads, 64))
    empty = partial(torch.empty, dtype=torch.float32, device=query.device)
    parts, part_lse = empty((heads, n, splits, d)), empty((heads, n, splits))
    out, lse = empty((heads, n, d)), empty((heads, n))
    padded = max(16, triton.next_power_of_2(d))
    token_bytes = padded * pages.dtype.itemsize
    if packing is not None and dtype == torch.float32:
        token_bytes *= 8  # unpacked numbers live in registers, where a full block of 32 bits does not fit
    block, c = min(128, max(16, BLOCK_BYTES // token_bytes)), pages.shape[2]
    in_pass = page_lse if block % c == 0 else None
    _attend_split[(kv_heads, splits)](
        query.to(dtype).contiguous(), pages, scales, norms, table, lengths, parts, part_lse, in_pass, scaling,
        columns, triton.cdiv(columns, splits), 0 if in_pass is None else in_pass.stride(0),
        G=group, C=c, D=d,
        PADDED_G=max(16, triton.next_power_of_2(group)), PADDED_D=padded,
        BLOCK=block, WIDEN=widened(dtype), num_stages=2,
    )  # fmt: skip
    _merge_splits[(heads * n,)](
        parts, part_lse, out, lse, splits, D=d, PADDED_D=padded, PADDED_SPLITS=triton.next_power_of_2(splits)
    )
    if page_lse is not None and in_pass is None:
        write_page_lse(query, pages, table, lengths, scaling, batch_pages, packing, page_lse)
    return out, lse
