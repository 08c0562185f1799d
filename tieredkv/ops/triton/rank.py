"""Ranking of chunks: sketches of keys, logits from sketches, ranks from logits.

Shapes: `n` dynamic heads, `G` query heads per KV head, `N` chunks, `C` chunk tokens, `r` directions of a sketch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tieredkv.ops.triton.project import project
from tieredkv.ops.triton.variants import launch
from tieredkv.ops.triton.walsh import KernelWalsh, store_part
from tieredkv.policy.digests import Digest
from tieredkv.policy.digests.sketch import Basis, Sketch

TOKENS = 128
"""Tokens whose sketches a program reads, in whole chunks."""
PACKED = 32
"""Tokens whose keys a program sketches."""
CHUNKS = 1024
"""Chunks that a program ranks."""
GROUPS = {"mean": 0, "max": 1, "max_logit": 2}


@triton.jit(do_not_specialize=["chunks"])
def _sketch_logits(
    small, packed, logits, parts, chunks,
    G: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr,
    PADDED_G: tl.constexpr, PADDED_H: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(0), tl.program_id(1)
    row, token = tl.arange(0, PADDED_G), block * TOKENS + tl.arange(0, TOKENS)
    exists = token < chunks * C
    H: tl.constexpr = R // 2 if BITS == 4 else R
    part = tl.arange(0, PADDED_H)
    wanted = (row[:, None] < G) & (part[None, :] < H)
    low = tl.load(small + (head * G + row[:, None]) * R + part[None, :], mask=wanted, other=0.0)
    where = packed + (head.to(tl.int64) * chunks * C + token[:, None]) * H + part[None, :]
    packed_numbers = tl.load(where, mask=exists[:, None] & (part[None, :] < H), other=0)
    if BITS == 4:
        high = tl.load(small + (head * G + row[:, None]) * R + H + part[None, :], mask=wanted, other=0.0)
        product = tl.dot(low, tl.trans((packed_numbers & 15).to(tl.float32) - 8.0), out_dtype=tl.float32)
        product += tl.dot(high, tl.trans((packed_numbers >> 4).to(tl.float32) - 8.0), out_dtype=tl.float32)
    else:
        product = tl.dot(low, tl.trans(packed_numbers.to(tl.int8, bitcast=True).to(tl.float32)), out_dtype=tl.float32)
    each = tl.reshape(product, (PADDED_G, TOKENS // C, C))
    best = tl.max(each, 2)
    mass = best + tl.log(tl.sum(tl.exp(each - best[:, :, None]), 2))
    chunk = block * (TOKENS // C) + tl.arange(0, TOKENS // C)
    target = logits + (head * G + row[:, None]) * chunks + chunk[None, :]
    tl.store(target, mass, mask=(row[:, None] < G) & (chunk[None, :] < chunks))
    store_part(parts, mass, head * G + row, row < G, chunk < chunks, block, tl.num_programs(1))


def sketch_logits(
    small: torch.Tensor, packed: torch.Tensor, bits: int, chunk_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Digest.logits_in_parts`: queries `(n, G, r)` along the directions, sketches `(n, N, bytes)` -> `(n, G, N)`,
    and a part for each program.

    C must be a power of two, at most `TOKENS`.
    """
    heads, group, r = small.shape
    chunks = packed.shape[1]
    programs = triton.cdiv(chunks * chunk_tokens, TOKENS)
    logits = torch.empty((heads, group, chunks), dtype=torch.float32, device=small.device)
    parts = torch.empty((heads, group, programs), dtype=torch.float32, device=small.device)
    halved = r // 2 if bits == 4 else r
    launch(
        _sketch_logits, (heads, programs),
        small, packed.contiguous(), logits, parts, chunks,
        G=group, C=chunk_tokens, R=r, BITS=bits,
        PADDED_G=max(16, triton.next_power_of_2(group)), PADDED_H=max(16, triton.next_power_of_2(halved)),
        TOKENS=TOKENS,
    )  # fmt: skip
    return logits, parts


@triton.jit(do_not_specialize=["tokens"])
def _sketch(
    keys, centre, down, packed, tokens, head_stride, chunk_stride,
    C: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr, MOST: tl.constexpr,
    WIDTH: tl.constexpr, PADDED_H: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head, token = tl.program_id(0), tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    part, exists = tl.arange(0, PADDED_H), token < tokens
    H: tl.constexpr = R // 2 if BITS == 4 else R
    where = head.to(tl.int64) * head_stride + (token // C).to(tl.int64) * chunk_stride + token % C * D
    low, high = tl.zeros([TOKENS, PADDED_H], tl.float32), tl.zeros([TOKENS, PADDED_H], tl.float32)
    for first in range(0, D, WIDTH):
        d = first + tl.arange(0, WIDTH)
        key = tl.load(keys + where[:, None] + d[None, :], mask=exists[:, None] & (d[None, :] < D), other=0.0)
        apart = key.to(tl.float32) - tl.load(centre + head * D + d, mask=d < D, other=0.0)[None, :]
        along = down + (head * D + d[:, None]) * R + part[None, :]
        inside = (d[:, None] < D) & (part[None, :] < H)
        low += tl.dot(apart, tl.load(along, mask=inside, other=0.0), input_precision="tf32x3")
        if BITS == 4:
            high += tl.dot(apart, tl.load(along + H, mask=inside, other=0.0), input_precision="tf32x3")
    target = packed + (head.to(tl.int64) * tokens + token[:, None]) * H + part[None, :]
    stored = exists[:, None] & (part[None, :] < H)
    low = tl.minimum(tl.maximum(tl.floor(low + 0.5), -MOST), MOST)
    if BITS == 4:
        high = tl.minimum(tl.maximum(tl.floor(high + 0.5), -MOST), MOST)
        tl.store(target, ((low + 8).to(tl.int32) | ((high + 8).to(tl.int32) << 4)).to(tl.uint8), mask=stored)
    else:
        tl.store(target, low.to(tl.int8).to(tl.uint8, bitcast=True), mask=stored)


def pack_sketches(keys: torch.Tensor, bits: int, basis: Basis) -> torch.Tensor:
    """As `Sketch.make`: keys `(K, n, C, D)`, the chunks of a head at even distances -> sketches `(K, n, bytes)`.

    Rounds halves up, torch to even: a sketch may differ by one step where a key lies just between two.
    """
    heads, chunks, c, d = keys.shape
    r = basis.down.shape[-1]
    halved = r // 2 if bits == 4 else r
    packed = torch.empty((heads, chunks, c * halved), dtype=torch.uint8, device=keys.device)
    launch(
        _sketch, (heads, triton.cdiv(chunks * c, PACKED)),
        keys, basis.centre, basis.down, packed, chunks * c, keys.stride(0), keys.stride(1),
        C=c, D=d, R=r, BITS=bits, MOST=2 ** (bits - 1) - 1,
        WIDTH=32, PADDED_H=max(16, triton.next_power_of_2(halved)), TOKENS=PACKED, num_stages=1,
    )  # fmt: skip
    return packed


class KernelSketch(Sketch):
    """`Sketch` by kernels. Logits fall back to torch for chunk sizes that the kernel does not support."""

    def make(self, keys: torch.Tensor, fitted: Basis) -> torch.Tensor:
        return pack_sketches(keys, self.bits, fitted)

    def project(
        self, query: torch.Tensor, heads: torch.Tensor, scaling: float, fitted: Basis
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return project(query, heads, scaling, fitted.up, fitted.centre)

    def logits_in_parts(
        self, prepared: torch.Tensor, digests: torch.Tensor, at_once: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.chunk_tokens & (self.chunk_tokens - 1) or self.chunk_tokens > TOKENS:
            return super().logits_in_parts(prepared, digests, at_once)
        return sketch_logits(prepared, digests, self.bits, self.chunk_tokens)


BY_KERNELS: dict[str, type[Digest[Any]]] = {kind.name: kind for kind in (KernelSketch, KernelWalsh)}
"""Digests that have kernels, by name."""


def by_kernels(digest: Digest[Any]) -> Digest[Any]:
    """As `Ops.digest`."""
    kind = BY_KERNELS.get(digest.name)
    return digest if kind is None else kind(digest.head_dim, digest.chunk_tokens, digest.bits)


@triton.jit(do_not_specialize=["chunks"])
def _parts(logits, parts, chunks, CHUNKS: tl.constexpr):
    row, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    chunk = block * CHUNKS + tl.arange(0, CHUNKS)
    each = tl.load(logits + row.to(tl.int64) * chunks + chunk, mask=chunk < chunks, other=-float("inf"))
    most = tl.max(each, 0)
    tl.store(parts + row * blocks + block, most + tl.log(tl.sum(tl.exp(each - most), 0)))


@triton.jit(do_not_specialize=["chunks", "count"])
def _ranks(
    logits, parts, chosen, ranks, chunks, count, stay,
    G: tl.constexpr, RULE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(0), tl.program_id(1)
    chunk = block * CHUNKS + tl.arange(0, CHUNKS)
    exists, part = chunk < chunks, tl.arange(0, CHUNKS)
    rank = tl.zeros([CHUNKS], tl.float32)
    if RULE == 2:
        rank -= float("inf")
    for g in range(G):
        row = head * G + g
        each = tl.load(logits + row.to(tl.int64) * chunks + chunk, mask=exists, other=-float("inf"))
        if RULE == 2:
            rank = tl.maximum(rank, each)
        else:
            most = tl.full([CHUNKS], -1e38, tl.float32)
            total = tl.zeros([CHUNKS], tl.float32)
            for first in range(0, count, CHUNKS):
                inside = first + part < count
                mass = tl.load(parts + row.to(tl.int64) * count + first + part, mask=inside, other=-1e38)
                better = tl.maximum(most, mass)
                total = total * tl.exp(most - better) + tl.where(inside, tl.exp(mass - better), 0.0)
                most = better
            best = tl.max(most, 0)
            share = tl.exp(each - best) / tl.sum(total * tl.exp(most - best), 0)
            if RULE == 1:
                rank = tl.maximum(rank, share)
            else:
                rank += share / G
    before = tl.load(chosen + head * chunks + chunk, mask=exists, other=0)
    tl.store(ranks + head * chunks + chunk, tl.where(before != 0, rank * stay, rank), mask=exists)


def chunk_ranks(
    logits: torch.Tensor, chosen: torch.Tensor, group: str, stay: float, parts: torch.Tensor | None = None
) -> torch.Tensor:
    """As `Ops.chunk_ranks`."""
    heads, queries, chunks = logits.shape
    blocks, rule = triton.cdiv(chunks, CHUNKS), GROUPS[group]
    ranks = torch.empty((heads, chunks), dtype=torch.float32, device=logits.device)
    if parts is None:
        parts = torch.empty((heads, queries, blocks), dtype=torch.float32, device=logits.device)
        if rule < 2:
            launch(_parts, (heads * queries, blocks), logits, parts, chunks, CHUNKS=CHUNKS)
    launch(
        _ranks, (heads, blocks),
        logits, parts, chosen.view(torch.uint8), ranks, chunks, parts.shape[2], stay,
        G=queries, RULE=rule, CHUNKS=CHUNKS,
    )  # fmt: skip
    return ranks
