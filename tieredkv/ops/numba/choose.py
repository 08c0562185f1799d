"""Ranks of chunks from their logits, the choice of the best, and the slots for those that are missing.

Shapes: `n` dynamic heads, `G` query heads per KV head, `N` chunks, `R` retrieval slots of a head.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tieredkv.ops import torch_ops
from tieredkv.ops.base import Listing, Pages, Source
from tieredkv.ops.numba.compiled import compiled, exp

RULES = {"mean": 0, "max": 1, "max_logit": 2}
"""Of `policy.select.GROUPS`."""
BLOCK = 256
"""Logits of which the largest are found side by side."""


@compiled
def _larger(row: Any, best: Any) -> None:
    for i in range(len(row)):
        best[i] = row[i] if row[i] > best[i] else best[i]


@compiled
def _most(row: Any) -> Any:
    """The largest of a row of at least one number."""
    best = np.full(BLOCK, row[0], np.float32)
    for first in range(0, len(row), BLOCK):
        _larger(row[first : first + BLOCK], best)
    most = best[0]
    for i in range(1, BLOCK):
        most = best[i] if best[i] > most else most
    return most


@compiled
def _exponentials(row: Any, most: Any, out: Any) -> Any:
    """Sets `out`; returns its sum."""
    total = np.float32(0)
    for i in range(len(row)):
        out[i] = exp(row[i] - most)
    for i in range(len(row)):
        total += out[i]
    return total


@compiled
def _add(row: Any, by: Any, out: Any) -> None:
    for i in range(len(row)):
        out[i] += row[i] * by


@compiled
def _larger_share(row: Any, by: Any, out: Any) -> None:
    for i in range(len(row)):
        out[i] = row[i] * by if row[i] * by > out[i] else out[i]


@compiled
def _stay(chosen: Any, stay: Any, out: Any) -> None:
    for i in range(len(chosen)):
        out[i] = out[i] * stay if chosen[i] else out[i]


@compiled(signatures=["void(float32[:,:,::1], boolean[:,::1], int64, float32, float32[:,::1])"])
def _ranks(logits: Any, chosen: Any, rule: Any, stay: Any, out: Any) -> None:
    heads, queries, chunks = logits.shape
    shares = np.empty(chunks, np.float32)
    for head in range(heads):
        ranks = out[head]
        for i in range(chunks):
            ranks[i] = -np.inf if rule == 2 else 0
        for row in range(queries):
            own = logits[head, row]
            if rule == 2:
                _larger(own, ranks)
                continue
            total = _exponentials(own, _most(own), shares)
            if rule == 0:
                _add(shares, np.float32(1) / (total * queries), ranks)
            else:
                _larger_share(shares, np.float32(1) / total, ranks)
        _stay(chosen[head], stay, ranks)


def chunk_ranks(
    logits: torch.Tensor, chosen: torch.Tensor, group: str, stay: float, parts: torch.Tensor | None = None
) -> torch.Tensor:
    """As `Ops.chunk_ranks`. parts: ignored."""
    ranks = torch.empty(chosen.shape, dtype=torch.float32, device="cpu")
    _ranks(logits.numpy(), chosen.numpy(), RULES[group], stay, ranks.numpy())
    return ranks


@compiled
def _mass_without(row: Any, chosen: Any, most: Any) -> Any:
    total = np.float32(0)
    for i in range(len(row)):
        total += np.float32(0) if chosen[i] else exp(row[i] - most)
    return total


@compiled(signatures=["void(float32[:,:,::1], boolean[:,::1], float32[:,::1])"])
def _log_mass(logits: Any, chosen: Any, out: Any) -> None:
    heads, queries, chunks = logits.shape
    apart = np.empty(chunks, np.float32)
    for head in range(heads):
        for row in range(queries):
            own = logits[head, row]
            for i in range(chunks):
                apart[i] = -np.inf if chosen[head, i] else own[i]
            most = _most(apart)
            out[head, row] = -np.inf if most == -np.inf else most + np.log(_mass_without(own, chosen[head], most))


def log_mass_without(logits: torch.Tensor, chosen: torch.Tensor, constant: torch.Tensor | None = None) -> torch.Tensor:
    """As `Ops.log_mass_without`."""
    mass = torch.empty(logits.shape[:2], dtype=torch.float32, device="cpu")
    _log_mass(logits.numpy(), chosen.numpy(), mass.numpy())
    return mass if constant is None else mass.add_(constant)


DIGIT, DIGITS = 11, 3
"""Bits by which keys are sorted at a time, and how often: 33 bits."""


@compiled
def _threshold(keys: Any, count: int) -> Any:
    """The key that is the `count`-th lowest of keys `(m,)` from 0 to 2**33 - 1, and how many equal to it are among the
    `count` lowest. count: from 1 to m."""
    prefix, left = 0, count
    for digit in range(DIGITS):
        shift = DIGIT * (DIGITS - 1 - digit)
        counts = np.zeros(2**DIGIT, np.int64)
        for i in range(len(keys)):
            if keys[i] >> (shift + DIGIT) == prefix:
                counts[(keys[i] >> shift) & (2**DIGIT - 1)] += 1
        value = 0
        while counts[value] < left:
            left -= counts[value]
            value += 1
        prefix = prefix << DIGIT | value
    return prefix, left


@compiled
def _descending(rank: Any) -> Any:
    """A whole number that is lower the higher a rank."""
    bits = np.int64(np.float32(rank).view(np.int32))
    return 2**31 - 1 - bits if bits >= 0 else bits + 2**32


@compiled(
    signatures=[
        "void(float32[:,::1], int64[::1], int32[:,::1], boolean[:,::1], int32[:,::1], int32[:,::1], int32[::1])",
    ]
)
def _choose(ranks: Any, selected: Any, slot_of: Any, chosen: Any, order: Any, missed: Any, misses: Any) -> None:
    heads, chunks = ranks.shape
    keys = np.empty(chunks, np.int64)
    for head in range(heads):
        for i in range(chunks):
            keys[i] = _descending(ranks[head, i])
        last, equal = _threshold(keys, selected[head]) if selected[head] > 0 else (-1, 0)
        found = before = 0
        for i in range(chunks):
            taken = keys[i] < last or (keys[i] == last and equal > 0)
            equal -= keys[i] == last
            chosen[head, i] = taken
            if taken and len(order) > 0:
                order[head, i] = before
                before += 1
            if taken and slot_of[head, i] < 0:
                missed[head, found] = i
                found += 1
        misses[head] = found


def choose(
    ranks: torch.Tensor,
    selected: torch.Tensor,
    slot_of: torch.Tensor,
    most: int,
    chosen: torch.Tensor,
    order: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Ops.choose`."""
    missed = torch.zeros((len(ranks), most), dtype=torch.int32, device="cpu")
    misses = torch.empty(len(ranks), dtype=torch.int32, device="cpu")
    listed = missed[:0] if order is None else order
    given = ranks.contiguous().numpy(), selected.numpy(), slot_of.numpy(), chosen.numpy(), listed.numpy()
    _choose(*given, missed.numpy(), misses.numpy())
    return missed, misses


PLACED = (
    "boolean(boolean[:,::1], boolean[:,::1], int32[:,::1], int32[::1], int32[:,::1], int32[:,::1], int32[:,::1], "
    "int32[::1], int32[:,::1], int64[::1], boolean, int32[:,::1], int64[::1], int64, int32[:,::1])"
)


@compiled(signatures=[PLACED])
def _place(
    wanted: Any,
    kept: Any,
    missed: Any,
    misses: Any,
    chunk_in: Any,
    last_used: Any,
    slots: Any,
    step: Any,
    victims: Any,
    total: Any,
    listed: Any,
    table: Any,
    rows: Any,
    first: Any,
    order: Any,
) -> Any:
    """Returns whether there were slots enough; nothing changed if not."""
    heads, width = slots.shape
    keys = np.empty((heads, width), np.int64)
    never = 2**32
    for head in range(heads):
        free = 0
        for r in range(width):
            chunk = chunk_in[head, r]
            taken = slots[head, r] < 0 or (chunk >= 0 and kept[head, chunk])
            keys[head, r] = never if taken else np.int64(last_used[head, r]) + 2**31
            free += not taken
        if free < misses[head]:
            return False
    for head in range(heads):
        last, equal = _threshold(keys[head], misses[head]) if misses[head] > 0 else (-1, 0)
        step[head] += listed
        found = 0
        for r in range(width):
            key, chunk = keys[head, r], chunk_in[head, r]
            victim = key < last or (key == last and equal > 0)
            equal -= key == last
            if victim:
                victims[head, found], chunk = r, missed[head, found]
                found += 1
            if victim or (chunk >= 0 and wanted[head, chunk]):
                last_used[head, r] = step[head]
                if listed:
                    table[rows[head], first + order[head, chunk]] = slots[head, r]
        total[head] += misses[head]
    return True


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
    victims = torch.zeros_like(missed)
    nowhere = victims[:0]
    given = (wanted, kept, missed, misses, chunk_in, last_used, slots, step, victims, total)
    if listing is None:
        where = (False, nowhere.numpy(), total[:0].numpy(), 0, nowhere.numpy())
    else:
        where = (True, listing.table.numpy(), listing.heads.numpy(), listing.first, listing.order.numpy())
    if not _place(*(tensor.numpy() for tensor in given), *where):
        raise ValueError("more chunks are missed than slots may be taken")
    return victims


GATHERED = (
    "void(int32[:,:,:], int32[:,::1], int64[::1], int32[:,::1], int32[:,::1], int32[::1], int32[:,::1], int32[:,::1], "
    "int32[:,::1], int64)"
)


@compiled(signatures=[GATHERED])
def _gather(
    source: Any,
    pool: Any,
    heads: Any,
    missed: Any,
    victims: Any,
    misses: Any,
    slots: Any,
    chunk_in: Any,
    slot_of: Any,
    first: Any,
) -> None:
    none = slot_of.shape[1] - 1
    for row in range(len(heads)):
        for i in range(misses[row]):
            chunk, local = missed[row, i], victims[row, i]
            record, page = source[heads[row], first + chunk], pool[slots[row, local]]
            for word in range(len(page)):
                page[word] = record[word]
            before = chunk_in[row, local]
            slot_of[row, before if before >= 0 else none] = -1
            chunk_in[row, local] = chunk
            slot_of[row, chunk] = local


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
    """As `Ops.gather`. By torch where chunks are not in memory, or are encoded on the way."""
    tables = (missed, victims, misses, slots, chunk_in, slot_of)
    if source.records is None or source.codec.bits != pages.codec.bits:
        torch_ops.gather(source, pages, heads, *tables, first_chunk)
        return
    words = source.records.view(torch.int32).numpy(), pages.records.view(torch.int32).numpy()
    _gather(*words, heads.numpy(), *(table.numpy() for table in tables), first_chunk)
