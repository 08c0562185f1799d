"""`Ops` in plain torch: used on a CPU, and the reference for every kernel. Contracts and shapes: `ops.base`.

`write` is not part of `Ops`: it has no kernel. `B` bytes of a record.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tieredkv.codecs.base import AT_ONCE, Codec
from tieredkv.ops.base import Listing, Pages, Source
from tieredkv.policy import select

HIDDEN = torch.finfo(torch.float32).min / 2
"""Logit of a masked key. Finite, so that a head with no key at all does not become NaN."""
NEVER = torch.iinfo(torch.int32).max
"""Stands for the last use of a slot that must not be taken."""
FLOAT32, INT64 = torch.float32.itemsize, torch.int64.itemsize
COPIED = 2**17
"""Bytes of records to copy at a time, as the cap does not count the copy between."""
IN_CACHE = 2**21
"""Bytes of unpacked keys at a time. More would not stay in a processor's cache."""


def _listed(mask: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Columns set in each row of a mask: `(rows, width)` int32, ascending; how many in each row; row and place of each.

    Row and place index the first result.
    """
    counts = mask.sum(1)
    row, column = mask.nonzero(as_tuple=True)
    place = _place_in_row(row, counts)
    out = torch.zeros((mask.shape[0], width), dtype=torch.int32, device=mask.device)
    out[row, place] = column.int()
    return out, counts.int(), row, place


def _place_in_row(row: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """How many elements of the same row come before each. row: in order. counts `(rows,)`: elements of each row."""
    return torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]


def choose(
    ranks: torch.Tensor,
    selected: torch.Tensor,
    slot_of: torch.Tensor,
    most: int,
    chosen: torch.Tensor,
    order: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Ops.choose`."""
    best = ranks.topk(most, dim=1).indices
    taken = torch.arange(most, device=ranks.device) < selected.unsqueeze(1)
    chosen.zero_().scatter_(1, best, taken)
    if order is not None:
        row, chunk = chosen.nonzero(as_tuple=True)
        order[row, chunk] = _place_in_row(row, chosen.sum(1)).int()
    missed, misses, _, _ = _listed(chosen & (slot_of[:, : ranks.shape[1]] < 0), most)
    return missed, misses


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
    """As `Ops.place`. Waits for the device."""
    resident = chunk_in.long().clamp(min=0)
    there = chunk_in >= 0
    age = last_used.masked_fill((there & kept.gather(1, resident)) | (slots < 0), NEVER)
    if bool((misses > (age != NEVER).sum(1)).any()):
        raise ValueError("more chunks are missed than slots may be taken")
    oldest = torch.arange(slots.shape[1], device=slots.device) < misses.unsqueeze(1)
    victim = torch.zeros_like(oldest).scatter_(1, age.argsort(dim=1, stable=True), oldest)
    victims, _, row, nth = _listed(victim, missed.shape[1])
    used = victim | (there & wanted.gather(1, resident))
    total += misses
    if listing is not None:
        step += 1
        resident[victim] = missed[row, nth].long()
        row, slot = used.nonzero(as_tuple=True)
        column = listing.order[row, resident[row, slot]]
        listing.table[listing.heads[row], listing.first + column.long()] = slots[row, slot]
    last_used.copy_(torch.where(used, step.unsqueeze(1), last_used))
    return victims


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
    """As `Ops.gather`. Waits for the device."""
    there = torch.arange(missed.shape[1], device=missed.device) < misses.unsqueeze(1)
    row, place = there.nonzero(as_tuple=True)
    chunk, local = missed[row, place].long(), victims[row, place].long()
    fetch(source, pages, heads[row], chunk + first_chunk, slots[row, local])
    slot_of[row, chunk_in[row, local].long()] = -1  # an empty slot holds chunk -1: the last column, which is no chunk
    chunk_in[row, local] = chunk.int()
    slot_of[row, chunk] = local.int()


def fetch(source: Source, pages: Pages, heads: torch.Tensor, chunks: torch.Tensor, slots: torch.Tensor) -> None:
    """As `Ops.fetch`. Waits for the device."""
    same = source.codec.bits == pages.codec.bits
    at_once = COPIED // pages.codec.chunk_bytes if same else AT_ONCE // pages.codec.chunk_tokens
    for head, chunk, slot in _split(max(1, at_once), heads.cpu(), chunks.cpu(), slots):
        records = _read(source, head, chunk).to(pages.records.device)
        if same:
            _words(pages.records)[slot.long()] = _words(records)
        else:
            fit = None if pages.fit is None else pages.fit.of_heads(head.to(slot.device))
            keys, values = source.codec.fields(records)
            _store(pages.codec.encode(keys, values, fit), pages, slot)


def append(
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: Pages,
    table: torch.Tensor,
    lengths: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """As `Ops.append`. Waits for the device."""
    column, place = divmod(int(count[0, 0]), pages.codec.chunk_tokens)
    fields, slots = pages.codec.encode(keys.unsqueeze(1), values.unsqueeze(1), pages.fit), table[:, column].long()
    records = pages.records.index_select(0, slots)
    for own, new in zip(pages.codec.fields(records), fields, strict=True):
        own[:, place] = new.squeeze(1)
    _words(pages.records)[slots] = _words(records)
    lengths[:, column] = place + 1
    count += 1


def keep(source: Source, pages: Pages, head: int, tokens: torch.Tensor, slots: torch.Tensor) -> None:
    """As `Ops.keep`. Waits for the device."""
    c = pages.codec.chunk_tokens
    same = source.codec.bits == pages.codec.bits
    place = torch.arange(len(tokens), device=slots.device)
    for token, slot, within in _split(AT_ONCE, tokens.cpu(), slots[place // c], place % c):
        if source.records is None:
            chunks, chunk = (token // c).unique(return_inverse=True)
            records = source.fetch(torch.full_like(chunks, head), chunks)
        else:
            records, chunk = source.records[head], token // c
        fields = tuple(field[chunk, token % c].to(slot.device) for field in source.codec.fields(records))
        if not same:
            keys, values = fields
            fields = _encoded(keys, values, pages, head)
        _store(fields, pages, slot, within)


def write(keys: torch.Tensor, values: torch.Tensor, pages: Pages, head: int, slots: torch.Tensor) -> None:
    """Write tokens `(b, D)` of one head into its pages `slots` `(>= b / C,)`, one after another."""
    c, place = pages.codec.chunk_tokens, torch.arange(len(keys), device=slots.device)
    for key, value, slot, within in _split(AT_ONCE, keys, values, slots[place // c], place % c):
        _store(_encoded(key.to(slot.device), value.to(slot.device), pages, head), pages, slot, within)


def _split(size: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Parts of at most `size` rows; none if there are no rows."""
    return zip(*(tensor.split(size) for tensor in tensors), strict=True) if len(tensors[0]) else iter(())


def _words(records: torch.Tensor) -> torch.Tensor:
    """Records `(..., B)` as int32: torch copies them by element."""
    return records.view(torch.int32)


def _read(source: Source, heads: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
    """A copy `(m, B)` of the source's records, as `Source.fetch`."""
    if source.records is None:
        return source.fetch(heads, chunks)
    return _words(source.records)[heads.long(), chunks.long()].view(torch.uint8)


def _encoded(keys: torch.Tensor, values: torch.Tensor, pages: Pages, head: int) -> tuple[torch.Tensor, ...]:
    """The fields of tokens `(b, D)` of one head, `(b, w)` each."""
    fit = None if pages.fit is None else pages.fit.of_heads(slice(head, head + 1))
    return tuple(field.squeeze(0) for field in pages.codec.encode(keys.unsqueeze(0), values.unsqueeze(0), fit))


def _store(
    fields: tuple[torch.Tensor, ...], pages: Pages, slots: torch.Tensor, within: torch.Tensor | None = None
) -> None:
    """Write fields into slots `(b,)`: of tokens at places `within`, `(b, w)`; or of whole chunks, `(b, C, w)`."""
    for field, target in zip(fields, pages.codec.fields(pages.records), strict=True):
        if within is None:
            target[slots.long()] = field.to(target.dtype)
        else:
            target[slots.long(), within] = field.to(target.dtype)


def record_unseen(
    unselected: torch.Tensor, lse: torch.Tensor, heads: torch.Tensor, unseen: torch.Tensor, total: torch.Tensor
) -> None:
    """As `Ops.record_unseen`."""
    unseen.copy_(select.unseen_share(unselected, lse[heads]))
    total += unseen


def adapt(
    selected: torch.Tensor,
    unseen: torch.Tensor,
    least: torch.Tensor,
    most: torch.Tensor,
    total: torch.Tensor,
    lengths: torch.Tensor,
    heads: torch.Tensor,
    first: int,
    columns: int,
    full: int,
) -> None:
    """As `Ops.adapt`."""
    selected.copy_(select.adapted(selected, unseen, least, most))
    total += selected
    there = torch.arange(columns, device=lengths.device) < selected.unsqueeze(1)
    lengths[heads, first : first + columns] = there.to(lengths.dtype) * full


def add_mass(
    chunk_mass: torch.Tensor,
    page_lse: torch.Tensor,
    lse: torch.Tensor,
    chosen: torch.Tensor,
    columns: torch.Tensor,
    heads: torch.Tensor,
    first: int,
) -> None:
    """As `Ops.add_mass`. Waits for the device."""
    of_pages = page_lse.view(*lse.shape, -1)
    for row, head in enumerate(heads.tolist()):
        chunk = chosen[row].nonzero().squeeze(1)
        column = columns[row, chunk].long()
        mass = of_pages[head].index_select(1, column + first).sub_(lse[head].unsqueeze(1)).exp_().sum(0)
        chunk_mass[chunk] += mass  # a head chooses a chunk once


def paged_attention(
    query: torch.Tensor,
    pages: Pages,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    batch_pages: int,
    page_lse: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Ops.paged_attention`. Waits for the device.

    Several tokens take no more scratch than one: a quarter for queries and sums, half for pages, the rest for outputs.
    """
    codec, (heads, n, d), kv_heads = pages.codec, query.shape, len(table)
    batch_pages, group = min(batch_pages, table.numel()), heads // kv_heads
    scratch = batch_pages * scratch_bytes(codec, group)
    at_once = min(n, max(1, scratch // 4 // (5 * heads * d * FLOAT32)))
    if n > 1:
        batch_pages = scratch // 2 // scratch_bytes(codec, group * at_once)
    width = max(1, min(batch_pages, most_pages(codec.chunk_tokens, d)) // kv_heads)
    if at_once == n:
        whole, lse = _attention(query, pages, table, lengths, scaling, width, page_lse)
        return whole.to(dtype), lse
    out = torch.empty((heads, n, d), dtype=dtype, device=query.device)
    lse = torch.empty((heads, n), dtype=torch.float32, device=query.device)
    for begin in range(0, n, at_once):
        part = slice(begin, begin + at_once)
        out[:, part], lse[:, part] = _attention(query[:, part], pages, table, lengths, scaling, width)
    return out, lse


def _attention(
    query: torch.Tensor,
    pages: Pages,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    width: int,
    page_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`paged_attention` that reads `width` columns of the table at a time."""
    codec, fit, (heads, n, d), (kv_heads, columns) = pages.codec, pages.fit, query.shape, table.shape
    c, folded = codec.chunk_tokens, query.float().reshape(kv_heads, -1, d)
    turned, constant = codec.turned(folded, fit) * scaling, codec.constant(folded, fit)
    shift = 0.0 if constant is None else (constant * scaling).unsqueeze(-1)
    within = torch.arange(c, device=table.device)
    top: torch.Tensor | None = None
    for first in range(0, columns, width):
        part = slice(first, min(columns, first + width))
        records = pages.records.index_select(0, table[:, part].flatten()).view(kv_heads, -1, codec.chunk_bytes)
        logits = codec.logits(turned, records)
        logits += (within >= lengths[:, part].unsqueeze(-1)).float().mul_(HIDDEN).view(kv_heads, 1, -1)
        before, top = top, logits.amax(-1, keepdim=True)
        if before is None:
            weights = logits.sub_(top).exp_()
            total, mixed = weights.sum(-1, keepdim=True), codec.mixed(weights, records)
        else:
            top = torch.maximum(before, top)
            weights, fading = logits.sub_(top).exp_(), before.sub_(top).exp_()
            total.mul_(fading).add_(weights.sum(-1, keepdim=True))
            mixed.mul_(fading).add_(codec.mixed(weights, records))
        if page_lse is not None:
            # The sums of short rows as a product: torch's own would take longer than the exponentials.
            of_pages = (weights.unflatten(-1, (-1, c)) @ weights.new_ones(c)).log_().add_(top).add_(shift)
            page_lse[:, part] = of_pages.view(heads, -1)
        del records  # or two batches would be there at once
    if top is None or bool((top < HIDDEN / 2).any()):
        raise ValueError("a KV head has no page to attend to")
    out, lse = codec.finished(mixed.div_(total), fit), total.log_().add_(top).add_(shift)
    return out.reshape(heads, n, d), lse.reshape(heads, n)


def most_pages(chunk_tokens: int, head_dim: int) -> int:
    """Pages that are worth reading at a time, however many the scratch has room for."""
    return max(1, IN_CACHE // (chunk_tokens * head_dim * FLOAT32))


def scratch_bytes(codec: Codec, rows: int) -> int:
    """What `paged_attention` takes per page that it reads at a time, for `rows` queries of a KV head: the record, keys
    or values unpacked (of bytes that hold two numbers one half at a time), logits and weights, a mask, an index."""
    numbers = codec.head_dim * min(max(codec.key_bits, codec.value_bits), 8) // 8
    per_token = numbers * (FLOAT32 + 1) + 2 * FLOAT32 + 2 * rows * FLOAT32 + FLOAT32 + 1
    return codec.chunk_bytes + codec.chunk_tokens * per_token + INT64
