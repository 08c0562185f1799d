"""Bringing chunks from the host tier into the slots of a layer's dynamic heads.

Shapes: `n` dynamic heads, `N` chunks, `R` retrieval slots per head, `K` KV heads, `P` columns of the page table.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tieredkv.cache.layer_pages import LayerPages
from tieredkv.memory.copies import BackgroundCopies
from tieredkv.memory.residency import Residency


class Fetching:
    """The retrieval slots of one layer's dynamic heads, and the copies that fill them."""

    def __init__(self, pages: LayerPages, heads: torch.Tensor, slots: torch.Tensor) -> None:
        """pages: the layer's, whose table lists the chunks in use. heads: `(n,)` KV heads. slots: `(n,)`, how many each
        has; they are taken from the pool."""
        phase, layout = pages.phase, pages.phase.plan.layout
        self._host, self._heads, self._ops, self._pool = pages.host, heads, phase.ops, pages.pool
        self._table, self._first_column = pages.table, pages.first_selected
        self._first_chunk, most, device = layout.sink_chunks, int(slots.max()), heads.device
        phase.ledger.reserve("tables", Residency.bytes_for(len(heads), most, layout.retrievable))
        owned = torch.full((len(heads), most), -1, dtype=torch.int64, device=device)
        owned[torch.arange(most, device=device) < slots.unsqueeze(1)] = phase.pool.take(int(slots.sum()))
        self.residency = Residency(owned, layout.retrievable)
        self.step = torch.zeros(1, dtype=torch.int32, device=device)
        """`(1,)`: steps begun."""

    def begin_step(self) -> None:
        """Count a step, so that what it uses is the last to give way."""
        self.step += 1

    def warm(self, mass: torch.Tensor) -> int:
        """Fill all slots with the chunks of highest `mass` `(n, N)`, on the host. Returns how many were copied."""
        index = self.residency
        if index.slots.shape[1] == 0:
            return 0
        likely = mass.topk(index.slots.shape[1], dim=-1).indices.to(index.slots.device)
        index.enter(likely)
        row, place = (index.slots >= 0).nonzero(as_tuple=True)
        chunks, slots = likely[row, place] + self._first_chunk, index.slots[row, place]
        self._ops.fetch(self._host, self._pool, self._heads[row], chunks, slots)
        return len(slots)

    def list_all(self) -> None:
        """List every slot in the page table: for heads that attend to all chunks in every step."""
        first, slots = self._first_column, self.residency.slots
        self._table[self._heads, first : first + slots.shape[1]] = slots

    def choose(
        self, ranks: torch.Tensor, counts: torch.Tensor, most: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The `counts` `(n,)` best chunks of each head, at most `most`, and those not in a slot: as `Ops.choose`."""
        return self._ops.choose(ranks, counts, self.residency.slot_of, most)

    def make_room(
        self, wanted: torch.Tensor, kept: torch.Tensor, missed: torch.Tensor, misses: torch.Tensor, listed: bool
    ) -> Callable[[], int]:
        """Find slots for missed chunks. Returns a function that copies them.

        wanted, kept `(n, N)`, missed, misses: as `Ops.place`. listed: whether the page table is to list the wanted
        chunks. The function always returns 0; copied chunks are counted on the device.
        """
        index, most = self.residency, missed.shape[1]
        used = index.chunk_in, index.last_used, index.slots
        table, column = (self._table, self._first_column) if listed else (None, 0)
        victims = self._ops.place(wanted, kept, misses, *used, self.step, most, table, self._heads, column)

        def copy() -> int:
            copied = self._host, self._pool, self._heads
            tables = index.slots, index.chunk_in, index.slot_of
            self._ops.gather(*copied, missed, victims, misses, *tables, self._first_chunk)
            return 0

        return copy


class FetchAhead:
    """Copies chunks into spare slots while a step computes, for heads that may reuse its choice in the next step."""

    def __init__(self, fetching: Fetching, counts: torch.Tensor, prefetcher: BackgroundCopies, key: int) -> None:
        """counts: `(n,)`, chunks per head. key: identifies the layer's copies in the prefetcher."""
        self._fetching, self._counts, self._most = fetching, counts, int(counts.max())
        self._prefetcher, self._key = prefetcher, key

    def wait(self) -> None:
        """Order later device work after the copies."""
        self._prefetcher.wait(self._key)

    def start(self, ranks: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Copy the best chunks by `ranks` `(n, N)` that are missing. Returns how many, `(n,)`. Slots of `chosen` are
        kept."""
        likely, missed, misses = self._fetching.choose(ranks, self._counts, self._most)
        copy = self._fetching.make_room(likely, likely | chosen, missed, misses, listed=False)
        self._prefetcher.submit(self._key, copy)
        return misses
