"""Copies into the pool: missed chunks and kept tokens out of page-locked host memory, and the new token.

Host memory is read by the kernels themselves, so ids stay on the device; on a CUDA machine the arena must be
page-locked. Shapes: `K` KV heads, `n` dynamic heads, `C` chunk tokens, `D` head dim, `S` slots of the pool.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PROGRAMS = 12
"""Enough to fill a link; more would only take the device's processors from who computes."""
PIECES, BLOCK = 4, 1024
"""Chunks that one program has under way, and how many words of each."""


@triton.jit
def _gather(
    arena, pool, heads, missed, victims, misses, slots, chunk_in, slot_of,
    head_count, first_chunk, most, count, slot_stride, chunk_stride, arena_stride,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    word, piece = tl.arange(0, BLOCK), tl.arange(0, PIECES)
    for head in range(head_count):
        absent = tl.load(misses + head)
        row = tl.load(heads + head).to(tl.int64)
        for begin in range(program * PIECES, absent, programs * PIECES):
            j = begin + piece
            there = j < absent
            chunk = tl.load(missed + head * most + j, mask=there, other=0)
            local = tl.load(victims + head * most + j, mask=there, other=0)
            slot = tl.load(slots + head * count + local, mask=there, other=0).to(tl.int64)
            source = row * arena_stride + (first_chunk + chunk).to(tl.int64) * WORDS
            for part in range(0, WORDS, BLOCK):
                inside = there[:, None] & (part + word[None, :] < WORDS)
                data = tl.load(arena + source[:, None] + part + word[None, :], mask=inside, other=0)
                tl.store(pool + slot[:, None] * WORDS + part + word[None, :], data, mask=inside)
            before = tl.load(chunk_in + head * slot_stride + local, mask=there, other=-1)
            tl.store(slot_of + head * chunk_stride + before, -1, mask=there & (before >= 0))
            tl.store(chunk_in + head * slot_stride + local, chunk, mask=there)
            tl.store(slot_of + head * chunk_stride + chunk, local, mask=there)


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
) -> None:
    """As `memory.residency.gather`: copy every missed chunk into its victim's slot and enter it in the tables.

    arena `(K, chunks, 2, C, D)` in host memory, a head's chunks contiguous. pages `(S, 2, C, D)`. heads `(n,)`. missed,
    victims `(n, m)`, of which the first `misses` `(n,)` count. Chunk ids count from `first_chunk` of the arena.
    """
    source, pool = arena.view(torch.int32), pages.view(torch.int32)
    words = pool[0].numel()
    _gather[(PROGRAMS,)](
        source, pool, heads, missed, victims, misses, slots, chunk_in, slot_of,
        len(heads), first_chunk, missed.shape[1], slots.shape[1],
        chunk_in.stride(0), slot_of.stride(0), source.stride(0),
        WORDS=words, BLOCK=min(BLOCK, triton.next_power_of_2(words)), PIECES=PIECES,
    )  # fmt: skip


@triton.jit
def _append(
    keys, values, pages, table, lengths, held, columns, C: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr
):  # fmt: skip
    head, d = tl.program_id(0), tl.arange(0, PADDED_D)
    count = tl.load(held)
    column, place = count // C, count % C
    to = tl.load(table + head * columns + column).to(tl.int64) * 2 * C * D + place * D + d
    tl.store(pages + to, tl.load(keys + head * D + d, mask=d < D, other=0.0), mask=d < D)
    tl.store(pages + to + C * D, tl.load(values + head * D + d, mask=d < D, other=0.0), mask=d < D)
    tl.store(lengths + head * columns + column, place + 1)


def append(
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    held: torch.Tensor,
) -> None:
    """As `memory.residency.append`: write a token's key and value `(K, D)` behind the `held` `(1,)` tokens of the
    recent region, whose pages are the first columns of `table` `(K, P)`. `held` is left as it was."""
    kv_heads, d = keys.shape
    _append[(kv_heads,)](
        keys.contiguous(), values.contiguous(), pages, table, lengths, held, table.shape[1],
        C=pages.shape[2], D=d, PADDED_D=triton.next_power_of_2(d),
    )  # fmt: skip


@triton.jit
def _keep(
    arena, pool, head, tokens, slots, count, arena_stride,
    C: tl.constexpr, WORDS: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    word, place = tl.arange(0, PADDED), tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = place < count
    token = tl.load(tokens + place, mask=there, other=0).to(tl.int64)
    slot = tl.load(slots + place // C, mask=there, other=0).to(tl.int64)
    source = tl.cast(head, tl.int64) * arena_stride + (token // C * 2 * C + token % C) * WORDS
    to = (slot * 2 * C + place % C) * WORDS
    inside = there[:, None] & (word[None, :] < WORDS)
    for part in range(2):
        where = part * C * WORDS + word[None, :]
        data = tl.load(arena + source[:, None] + where, mask=inside, other=0)
        tl.store(pool + to[:, None] + where, data, mask=inside)


def keep(arena: torch.Tensor, pages: torch.Tensor, head: int, tokens: torch.Tensor, slots: torch.Tensor) -> None:
    """As `memory.residency.keep`: pack single tokens `(b,)` of one head into pages `slots` `(>= b / C,)`.

    arena `(K, chunks, 2, C, D)` in host memory, pages `(S, 2, C, D)`.
    """
    if len(tokens) == 0:
        return
    source, pool = arena.view(torch.int32), pages.view(torch.int32)
    words, tokens_at_once = pool.shape[-1], 16
    _keep[(triton.cdiv(len(tokens), tokens_at_once),)](
        source, pool, head, tokens.to(pages.device), slots, len(tokens), source.stride(0),
        C=pages.shape[2], WORDS=words, PADDED=triton.next_power_of_2(words), TOKENS=tokens_at_once,
    )  # fmt: skip


@triton.jit
def _fetch(
    arena, pool, heads, chunks, slots, count, arena_stride,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    word, piece = tl.arange(0, BLOCK), tl.arange(0, PIECES)
    for begin in range(tl.program_id(0) * PIECES, count, tl.num_programs(0) * PIECES):
        there = begin + piece < count
        row = tl.load(heads + begin + piece, mask=there, other=0).to(tl.int64)
        chunk = tl.load(chunks + begin + piece, mask=there, other=0).to(tl.int64)
        slot = tl.load(slots + begin + piece, mask=there, other=0).to(tl.int64)
        source = row * arena_stride + chunk * WORDS
        for part in range(0, WORDS, BLOCK):
            inside = there[:, None] & (part + word[None, :] < WORDS)
            data = tl.load(arena + source[:, None] + part + word[None, :], mask=inside, other=0)
            tl.store(pool + slot[:, None] * WORDS + part + word[None, :], data, mask=inside)


def fetch(
    arena: torch.Tensor, pages: torch.Tensor, heads: torch.Tensor, chunks: torch.Tensor, slots: torch.Tensor
) -> None:
    """As `memory.residency.fetch`: copy chunk `chunks[i]` of head `heads[i]` into pool slot `slots[i]`, all `(m,)`."""
    if len(chunks) == 0:
        return
    source, pool, device = arena.view(torch.int32), pages.view(torch.int32), pages.device
    words = pool[0].numel()
    _fetch[(PROGRAMS,)](
        source, pool, heads.to(device), chunks.to(device), slots.to(device), len(chunks), source.stride(0),
        WORDS=words, BLOCK=min(BLOCK, triton.next_power_of_2(words)), PIECES=PIECES,
    )  # fmt: skip
