"""Attention mass: what a step did not see, and what each chunk received.

Shapes: `n` dynamic heads, `G` query heads per KV head, `N` chunks, `H` query heads, `P` columns of the page table, `R`
retrieval slots of a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tieredkv.ops.triton.variants import bounded, launch

CHUNKS = 128
"""Chunks whose mass a program adds up."""


@triton.jit(do_not_specialize=["chunks"])
def _log_mass_without(logits, chosen, constant, out, chunks, G: tl.constexpr, BLOCK: tl.constexpr):
    row, place = tl.program_id(0), tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -1e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, chunks, BLOCK):
        chunk = first + place
        exists = chunk < chunks
        taken = tl.load(chosen + row // G * chunks + chunk, mask=exists, other=1)
        each = tl.load(logits + row.to(tl.int64) * chunks + chunk, mask=taken == 0, other=-1e38)
        better = tl.maximum(best, each)
        total = total * tl.exp(best - better) + tl.where(taken == 0, tl.exp(each - better), 0.0)
        best = better
    most = tl.max(best, 0)
    whole = tl.sum(total * tl.exp(best - most), 0)
    mass = tl.where(whole > 0, most + tl.log(tl.maximum(whole, 1e-38)), -float("inf"))
    if constant is not None:
        mass += tl.load(constant + row)
    tl.store(out + row, mass)


def log_mass_without(logits: torch.Tensor, chosen: torch.Tensor, constant: torch.Tensor | None = None) -> torch.Tensor:
    """As `Ops.log_mass_without`."""
    heads, queries, chunks = logits.shape
    out = torch.empty((heads, queries), dtype=torch.float32, device=logits.device)
    launch(
        _log_mass_without, (heads * queries,),
        logits, chosen.view(torch.uint8), constant, out, chunks,
        G=queries, BLOCK=bounded(chunks, 1024, 4096), num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _record_unseen(unselected, lse, heads, unseen, total, G: tl.constexpr, PADDED_G: tl.constexpr):
    head, g = tl.program_id(0), tl.arange(0, PADDED_G)
    missed = tl.load(unselected + head * G + g, mask=g < G, other=-float("inf"))
    seen = tl.load(lse + tl.load(heads + head) * G + g, mask=g < G, other=0.0)
    share = tl.sum(tl.where(g < G, 1 / (1 + tl.exp(seen - missed)), 0.0), 0) / G
    tl.store(unseen + head, share)
    tl.store(total + head, tl.load(total + head) + share.to(tl.float64))


def record_unseen(
    unselected: torch.Tensor, lse: torch.Tensor, heads: torch.Tensor, unseen: torch.Tensor, total: torch.Tensor
) -> None:
    """As `Ops.record_unseen`."""
    n, group = unselected.shape
    launch(
        _record_unseen, (n,),
        unselected, lse, heads, unseen, total, G=group, PADDED_G=triton.next_power_of_2(group), num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "chunks", "first", "lse_stride", "column_stride"])
def _add_mass(
    chunk_mass, page_lse, lse, chosen, columns, heads, count, chunks, first, lse_stride, column_stride,
    G: tl.constexpr, PADDED_G: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    chunk, g = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS), tl.arange(0, PADDED_G)
    exists = chunk < chunks
    mass = tl.load(chunk_mass + chunk, mask=exists, other=0.0)
    for head in range(count):
        row = tl.load(heads + head) * G + g
        taken = tl.load(chosen + head * chunks + chunk, mask=exists, other=0) != 0
        column = tl.load(columns + head * column_stride + chunk, mask=taken, other=0)
        where = page_lse + row[:, None] * lse_stride + (first + column)[None, :]
        inside = (g[:, None] < G) & taken[None, :]
        each = tl.load(where, mask=inside, other=-float("inf"))
        whole = tl.load(lse + row, mask=g < G, other=0.0)
        mass += tl.sum(tl.exp(each - whole[:, None]), 0)
    tl.store(chunk_mass + chunk, mass, mask=exists)


def add_mass(
    chunk_mass: torch.Tensor,
    page_lse: torch.Tensor,
    lse: torch.Tensor,
    chosen: torch.Tensor,
    columns: torch.Tensor,
    heads: torch.Tensor,
    first: int,
) -> None:
    """As `Ops.add_mass`."""
    (n, chunks), group = chosen.shape, lse.shape[1]
    launch(
        _add_mass, (triton.cdiv(chunks, CHUNKS),),
        chunk_mass, page_lse, lse, chosen.view(torch.uint8), columns, heads,
        n, chunks, first, page_lse.stride(0), columns.stride(0),
        G=group, PADDED_G=triton.next_power_of_2(group), CHUNKS=CHUNKS, num_warps=4,
    )  # fmt: skip
