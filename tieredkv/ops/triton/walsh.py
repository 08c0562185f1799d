"""Logits from digests of blocks of keys. They are made in torch: once per chunk, which takes a matrix product or two.

Shapes: `n` dynamic heads, `G` query heads per KV head, `N` chunks, `C` chunk tokens, `B` tokens of a block; `P` and `Q`
bytes of a block's mean and of a difference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tieredkv.ops.triton.project import project
from tieredkv.ops.triton.variants import launch
from tieredkv.policy.digests.walsh import MIDDLE, MOST_BLOCK, Directions, Walsh


def tokens_at_once(digest: Walsh) -> int:
    """Tokens whose digests a program reads, in whole chunks: fewer of wide heads, as registers are few."""
    return 128 if digest.other_bytes <= 32 else 64


@triton.jit
def store_part(parts, mass, rows, wanted, exists, part, count):
    """Store the log-sum-exp of the masses `(rows, chunks)` of a program as the part number `part` of `count`.

    The first chunk exists. rows: of `parts`, where `wanted`.
    """
    each = tl.where(exists[None, :], mass, -float("inf"))
    most = tl.max(each, 1)
    whole = most + tl.log(tl.sum(tl.exp(each - most[:, None]), 1))
    tl.store(parts + rows.to(tl.int64) * count + part, whole, mask=wanted)


@triton.jit(do_not_specialize=["chunks"])
def _walsh_logits(
    weights, packed, logits, parts, chunks,
    G: tl.constexpr, C: tl.constexpr, B: tl.constexpr, LOG_B: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    PADDED_G: tl.constexpr, PADDED_P: tl.constexpr, PADDED_Q: tl.constexpr, MIDDLE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head, program = tl.program_id(0), tl.program_id(1)
    BLOCKS: tl.constexpr = TOKENS // B
    BYTES: tl.constexpr = P + (B - 1) * Q
    row, part_p, part_q = tl.arange(0, PADDED_G), tl.arange(0, PADDED_P), tl.arange(0, PADDED_Q)
    exists = program * BLOCKS + tl.arange(0, BLOCKS) < chunks * (C // B)
    start = packed + head.to(tl.int64) * chunks * (C // B * BYTES) + program * BLOCKS * BYTES
    at = start + tl.arange(0, BLOCKS)[:, None] * BYTES + part_p[None, :]
    means = tl.load(at, mask=exists[:, None] & (part_p[None, :] < P), other=0)
    token = tl.arange(0, TOKENS)
    place = token % B  # of a coefficient: 0 is the mean
    there = (program * BLOCKS + token // B < chunks * (C // B)) & (place > 0)
    at = start + (token // B * BYTES + P + (place - 1) * Q)[:, None] + part_q[None, :]
    others = tl.load(at, mask=there[:, None] & (part_q[None, :] < Q), other=0)
    own = weights + (head * G + row[:, None]) * (4 * (P + Q))
    mean = tl.zeros([PADDED_G, BLOCKS], tl.float32)
    other = tl.zeros([PADDED_G, TOKENS], tl.float32)
    for shift in tl.static_range(4):
        of_mean = tl.load(own + shift * P + part_p[None, :], mask=(row[:, None] < G) & (part_p[None, :] < P), other=0.0)
        number = ((means >> (2 * shift)) & 3).to(tl.float32) - MIDDLE
        mean += tl.dot(of_mean, tl.trans(number), out_dtype=tl.float32)
        of_other = tl.load(
            own + 4 * P + shift * Q + part_q[None, :], mask=(row[:, None] < G) & (part_q[None, :] < Q), other=0.0
        )
        number = ((others >> (2 * shift)) & 3).to(tl.float32) - MIDDLE
        other += tl.dot(of_other, tl.trans(number), out_dtype=tl.float32)
    first = tl.arange(0, B)[None, None, :] == 0
    each = tl.where(first, mean[:, :, None], tl.reshape(other, (PADDED_G, BLOCKS, B)))
    # Each round adds and subtracts neighbours, and makes the lowest bit of the place the highest. After LOG_B rounds
    # all bits are where they were.
    for _ in tl.static_range(LOG_B):
        even, odd = tl.split(tl.reshape(each, (PADDED_G, BLOCKS, B // 2, 2)))
        both = tl.join(even + odd, even - odd)
        each = tl.reshape(tl.permute(both, (0, 1, 3, 2)), (PADDED_G, BLOCKS, B))
    each = tl.reshape(each, (PADDED_G, TOKENS // C, C))
    best = tl.max(each, 2)
    mass = best + tl.log(tl.sum(tl.exp(each - best[:, :, None]), 2))
    chunk = program * (TOKENS // C) + tl.arange(0, TOKENS // C)
    target = logits + (head * G + row[:, None]) * chunks + chunk[None, :]
    tl.store(target, mass, mask=(row[:, None] < G) & (chunk[None, :] < chunks))
    store_part(parts, mass, head * G + row, row < G, chunk < chunks, program, tl.num_programs(1))


def walsh_logits(prepared: torch.Tensor, packed: torch.Tensor, digest: Walsh) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Digest.logits_in_parts`: prepared queries `(n, G, numbers)`, digests `(n, N, bytes)` -> `(n, G, N)`, and a
    part for each program.

    C must be a power of two from `MOST_BLOCK` to `tokens_at_once`.
    """
    heads, group, _ = prepared.shape
    chunks, p, q, tokens = packed.shape[1], digest.mean_bytes, digest.other_bytes, tokens_at_once(digest)
    programs = triton.cdiv(chunks * digest.chunk_tokens, tokens)
    logits = torch.empty((heads, group, chunks), dtype=torch.float32, device=prepared.device)
    parts = torch.empty((heads, group, programs), dtype=torch.float32, device=prepared.device)
    launch(
        _walsh_logits, (heads, programs),
        prepared.contiguous(), packed.contiguous(), logits, parts, chunks,
        G=group, C=digest.chunk_tokens, B=digest.block, LOG_B=digest.block.bit_length() - 1, P=p, Q=q,
        PADDED_G=max(16, triton.next_power_of_2(group)), PADDED_P=max(16, triton.next_power_of_2(p)),
        PADDED_Q=max(16, triton.next_power_of_2(q)), MIDDLE=MIDDLE, TOKENS=tokens, num_warps=4 if q <= 32 else 8,
    )  # fmt: skip
    return logits, parts


class KernelWalsh(Walsh):
    """`Walsh` with queries and logits by kernels; logits by torch for chunk sizes that the kernel does not support."""

    def project(
        self, query: torch.Tensor, heads: torch.Tensor, scaling: float, fitted: Directions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return project(query, heads, scaling, fitted.up, fitted.centre, fitted.column, fitted.weight)

    def logits_in_parts(
        self, prepared: torch.Tensor, digests: torch.Tensor, at_once: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        c = self.chunk_tokens
        if c & (c - 1) or not MOST_BLOCK <= c <= tokens_at_once(self):
            return super().logits_in_parts(prepared, digests, at_once)
        return walsh_logits(prepared, digests, self)
