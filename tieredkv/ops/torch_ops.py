"""`Ops` in plain torch: used on a CPU, and the reference for every kernel. Contracts and shapes: `ops.base`.

`write` is not part of `Ops`: it has no kernel.
"""

from __future__ import annotations

import torch

from tieredkv.attention.exact import HIDDEN, flash, merge
from tieredkv.ops.packing import AT_ONCE, Packing, pack

NEVER = torch.iinfo(torch.int32).max
"""Stands for the last use of a slot that must not be taken."""


def _listed(mask: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Columns set in each row of a mask: `(rows, width)` int32, ascending; how many in each row; row and place of each.

    Row and place index the first result.
    """
    counts = mask.sum(1)
    row, column = mask.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=mask.device) - (counts.cumsum(0) - counts)[row]
    out = torch.zeros((mask.shape[0], width), dtype=torch.int32, device=mask.device)
    out[row, place] = column.int()
    return out, counts.int(), row, place


def choose(
    ranks: torch.Tensor, selected: torch.Tensor, slot_of: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `Ops.choose`."""
    best = ranks.topk(most, dim=1).indices
    taken = torch.arange(most, device=ranks.device) < selected.unsqueeze(1)
    chosen = torch.zeros_like(ranks, dtype=torch.bool).scatter_(1, best, taken)
    missed, misses, _, _ = _listed(chosen & (slot_of[:, : ranks.shape[1]] < 0), most)
    return chosen, missed, misses


def place(
    wanted: torch.Tensor,
    kept: torch.Tensor,
    misses: torch.Tensor,
    chunk_in: torch.Tensor,
    last_used: torch.Tensor,
    slots: torch.Tensor,
    step: torch.Tensor,
    most: int,
    table: torch.Tensor | None,
    heads: torch.Tensor,
    first: int,
) -> torch.Tensor:
    """As `Ops.place`. Waits for the device."""
    resident = chunk_in.long().clamp(min=0)
    there = chunk_in >= 0
    age = last_used.masked_fill((there & kept.gather(1, resident)) | (slots < 0), NEVER)
    if bool((misses > (age != NEVER).sum(1)).any()):
        raise ValueError("more chunks are missed than slots may be taken")
    order = age.argsort(dim=1, stable=True)
    oldest = torch.arange(slots.shape[1], device=slots.device) < misses.unsqueeze(1)
    victim = torch.zeros_like(oldest).scatter_(1, order, oldest)
    victims, _, _, _ = _listed(victim, most)
    used = victim | (there & wanted.gather(1, resident))
    last_used.copy_(torch.where(used, step, last_used))
    if table is not None:
        local, _, row, column = _listed(used, slots.shape[1])
        table[heads[row], first + column] = slots[row, local[row, column].long()]
    return victims


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
    """As `Ops.gather`. Waits for the device."""
    there = torch.arange(missed.shape[1], device=missed.device) < misses.unsqueeze(1)
    row, place = there.nonzero(as_tuple=True)
    chunk, local = missed[row, place].long(), victims[row, place].long()
    fetch(arena, pages, heads[row], chunk + first_chunk, slots[row, local], packing)
    slot_of[row, chunk_in[row, local].long()] = -1  # an empty slot holds chunk -1: the last column, which is no chunk
    chunk_in[row, local] = chunk.int()
    slot_of[row, chunk] = local.int()


def fetch(
    arena: torch.Tensor,
    pages: torch.Tensor,
    heads: torch.Tensor,
    chunks: torch.Tensor,
    slots: torch.Tensor,
    packing: Packing | None = None,
) -> None:
    """As `Ops.fetch`. Waits for the device."""
    source = heads.to(arena.device), chunks.to(arena.device)
    if packing is None:
        pages[slots] = arena[source].to(pages.device)
        return
    chunks_at_once = max(1, AT_ONCE // arena.shape[3])
    for head, chunk, slot in zip(*(ids.split(chunks_at_once) for ids in (*source, slots)), strict=True):
        tokens, norms = arena[head, chunk].to(pages.device), packing.norms[head.to(pages.device)].unsqueeze(2)
        pages[slot], packing.scales[slot] = pack(tokens, norms)


def append(
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    count: torch.Tensor,
    packing: Packing | None = None,
) -> None:
    """As `Ops.append`. Waits for the device."""
    column, place = divmod(int(count), pages.shape[2])
    slots = table[:, column].long()
    token = torch.stack((keys, values), dim=1)
    if packing is None:
        pages[slots, :, place] = token
    else:
        pages[slots, :, place], packing.scales[slots, :, place] = pack(token, packing.norms)
    lengths[:, column] = place + 1


def keep(
    arena: torch.Tensor,
    pages: torch.Tensor,
    head: int,
    tokens: torch.Tensor,
    slots: torch.Tensor,
    packing: Packing | None = None,
) -> None:
    """As `Ops.keep`. Waits for the device."""
    c = pages.shape[2]
    write(arena[head, tokens // c, :, tokens % c], pages, head, slots, packing)


def write(
    tokens: torch.Tensor, pages: torch.Tensor, head: int, slots: torch.Tensor, packing: Packing | None = None
) -> None:
    """Write keys and values `(b, 2, D)` of one head into its pages `slots` `(>= b / C,)`, one after another."""
    place = torch.arange(len(tokens), device=pages.device)
    page, within = slots[place // pages.shape[2]], place % pages.shape[2]
    if packing is None:
        pages[page, :, within] = tokens.to(pages)
        return
    for part, slot, row in zip(*(each.split(AT_ONCE) for each in (tokens, page, within)), strict=True):
        pages[slot, :, row], packing.scales[slot, :, row] = pack(part.to(pages.device), packing.norms[head])


def add_mass(chunk_mass: torch.Tensor, logits: torch.Tensor, shift: torch.Tensor, chosen: torch.Tensor) -> None:
    """As `Ops.add_mass`."""
    mass = (logits + shift.unsqueeze(-1)).exp_().sum(1)
    chunk_mass.add_(mass.mul_(chosen).sum(0))


def paged_attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    batch_pages: int,
    packing: Packing | None = None,
    page_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Ops.paged_attention`. Waits for the device."""
    if page_lse is not None:
        write_page_lse(query, pages, table, lengths, scaling, batch_pages, packing, page_lse)
    heads, n, d = query.shape
    kv_heads, columns = table.shape
    c = pages.shape[2]
    rows, within = pages.view(-1, d), torch.arange(c, device=pages.device)
    folded = query.float().reshape(kv_heads, -1, d)
    if packing is not None:
        folded = folded * packing.norms[:, :1]
    width = max(1, batch_pages // kv_heads)
    merged: tuple[torch.Tensor, torch.Tensor] | None = None

    def read(ids: torch.Tensor) -> torch.Tensor:
        tokens = rows.index_select(0, ids).float()
        if packing is not None:
            tokens *= packing.scales.view(-1).index_select(0, ids).float().unsqueeze(-1)
        return tokens.view(kv_heads, -1, d)

    for first in range(0, columns, width):
        part = slice(first, first + width)
        ids = (table[:, part].long().unsqueeze(-1) * (2 * c) + within).view(-1)
        keys = read(ids)
        values = read(ids.add_(c))
        absent = within >= lengths[:, part].unsqueeze(-1)
        hidden = absent.float().mul_(HIDDEN).view(1, kv_heads, 1, -1)
        out, lse = flash(folded, keys, values, scaling, False, hidden)
        step = out.reshape(heads, n, d), lse.reshape(heads, n)
        merged = step if merged is None else merge(*merged, *step)
    if merged is None or bool((merged[1] < HIDDEN / 2).any()):
        raise ValueError("a KV head has no page to attend to")
    if packing is not None:
        out = merged[0].view(kv_heads, -1, d) * packing.norms[:, 1:]
        merged = out.view(heads, n, d), merged[1]
    return merged


def write_page_lse(
    query: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    batch_pages: int,
    packing: Packing | None,
    page_lse: torch.Tensor,
) -> None:
    """Write `page_lse` as `Ops.paged_attention` does, reading the keys once more."""
    (heads, _, d), (kv_heads, columns), c = query.shape, table.shape, pages.shape[2]
    folded = query.float().reshape(kv_heads, -1, d) * scaling
    if packing is not None:
        folded = folded * packing.norms[:, :1]
    halves, within = pages.flatten(2).flatten(0, 1), torch.arange(c, device=pages.device)  # a page's keys, its values
    # Logits take three copies where attention takes values: fewer pages at a time for many queries or narrow heads.
    width = max(1, batch_pages * d // (kv_heads * (d + 2 * folded.shape[1])))
    for first in range(0, columns, width):
        part = slice(first, min(columns, first + width))
        ids = table[:, part].long().flatten() * 2
        keys = halves.index_select(0, ids).float().view(kv_heads, -1, d)
        if packing is not None:
            keys *= packing.scales.flatten(0, 1).index_select(0, ids).float().view(kv_heads, -1, 1)
        logits = (folded @ keys.mT).unflatten(-1, (-1, c))
        logits += (within >= lengths[:, part].unsqueeze(-1)).float().mul_(HIDDEN).unsqueeze(1)
        page_lse[:, part] = logits.logsumexp(-1).view(heads, -1)
