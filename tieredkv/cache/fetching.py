"""Bringing chunks from the host tier into the slots of a layer's dynamic heads.

Shapes: `n` dynamic heads, `N` chunks, `R` retrieval slots per head, `K` KV heads, `P` columns of the page table.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tieredkv.cache.filling import numbers
from tieredkv.cache.layer_pages import LayerPages
from tieredkv.memory.copies import BackgroundCopies
from tieredkv.memory.residency import Residency
from tieredkv.ops.base import Listing


class Fetching:
    """The retrieval slots of one layer's dynamic heads, and the copies that fill them."""

    def __init__(
        self, pages: LayerPages, heads: torch.Tensor, slots: torch.Tensor, chunks: torch.Tensor, listed: bool
    ) -> None:
        """pages: the layer's, whose table lists the chunks in use. heads: `(n,)` KV heads. slots: `(n,)`, how many each
        has; they are taken from the pool. chunks `(n, R)`: with which they are filled, those that will be replaced last
        first. All on the host. listed: choose every chunk and list every slot in the page table, for heads that attend
        to all in every step."""
        phase, layout = pages.phase, pages.phase.plan.layout
        self._host, self._ops, self._pool = pages.host, phase.ops, pages.pool
        device = pages.device
        self._heads = heads.to(device, non_blocking=True)
        self._first_chunk, most = layout.sink_chunks, int(slots.max())
        phase.ledger.reserve("tables", Residency.bytes_for(len(heads), most, layout.retrievable))
        owned = torch.full((len(heads), most), -1, dtype=torch.int64, device="cpu")
        there = torch.arange(most, device="cpu") < slots.unsqueeze(1)
        owned[there] = numbers(phase.pool.take(int(slots.sum())))
        owner = heads.unsqueeze(1).expand_as(owned)
        pages.filling.copy(owner[there], chunks[there] + self._first_chunk, owned[there])
        self.residency = Residency(owned.to(device, non_blocking=True), layout.retrievable)
        self.residency.enter(chunks.to(device, non_blocking=True))
        self.step = torch.zeros(len(heads), dtype=torch.int32, device=device)
        """`(n,)`: steps begun; the same for every head."""
        order = self.residency.slot_of  # if all chunks are listed, each in the column of its slot's number
        if phase.chunk_order is not None:
            order = phase.chunk_order[: len(heads) * layout.retrievable].view(len(heads), layout.retrievable)
        self.listing = Listing(pages.table, self._heads, pages.first_selected, order)
        """Where the table lists the chunks in use."""
        if listed:
            pages.filling.table[heads, pages.first_selected : pages.first_selected + most] = owned.int()
            self.residency.chosen.fill_(True)

    def choose(
        self, ranks: torch.Tensor, counts: torch.Tensor, most: int, chosen: torch.Tensor, listed: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Set `chosen` `(n, N)` to the `counts` `(n,)` best chunks of each head, at most `most`. Returns those not in a
        slot: as `Ops.choose`. listed: whether the table is going to list them."""
        return self._ops.choose(
            ranks, counts, self.residency.slot_of, most, chosen, self.listing.order if listed else None
        )

    def make_room(
        self,
        wanted: torch.Tensor,
        kept: torch.Tensor,
        missed: torch.Tensor,
        misses: torch.Tensor,
        total: torch.Tensor,
        listing: Listing | None,
    ) -> Callable[[], int]:
        """Find slots for missed chunks. Returns a function that copies them.

        wanted, kept `(n, N)`, missed, misses, total, listing: as `Ops.place`; with a listing a step begins. The
        function always returns 0; copied chunks are counted on the device.
        """
        index = self.residency
        used = index.chunk_in, index.last_used, index.slots
        victims = self._ops.place(wanted, kept, missed, misses, *used, self.step, total, listing)

        def copy() -> int:
            copied = self._host, self._pool, self._heads
            tables = index.slots, index.chunk_in, index.slot_of
            self._ops.gather(*copied, missed, victims, misses, *tables, self._first_chunk)
            return 0

        return copy


class FetchAhead:
    """Copies chunks in the background into slots of one layer, while something else is computed."""

    def __init__(self, fetching: Fetching, most: int, prefetcher: BackgroundCopies, key: int) -> None:
        """most: chunks per head, at most. key: identifies the layer's copies in the prefetcher."""
        self._fetching, self._most = fetching, most
        self._prefetcher, self._key = prefetcher, key

    def wait(self) -> None:
        """Order later device work after the copies."""
        self._prefetcher.wait(self._key)

    def start(self, ranks: torch.Tensor, counts: torch.Tensor, total: torch.Tensor, chosen: torch.Tensor) -> None:
        """Copy those of the `counts` `(n,)` best chunks by `ranks` `(n, N)` that are missing, and add their number to
        `total` `(n,)`. The slots of the best are kept, and those of `chosen` `(n, N)`."""
        self._prefetcher.submit(self._key, self._found(ranks, counts, total, chosen))

    def start_ranking(self, rank: Callable[[], torch.Tensor], counts: torch.Tensor, total: torch.Tensor) -> None:
        """`start` by what `rank` returns, with none chosen. Ranking and placing run in the background too: until
        `wait`, nothing else reads or writes what they do."""
        self._prefetcher.submit(self._key, lambda: self._found(rank(), counts, total, None)())

    def _found(
        self, ranks: torch.Tensor, counts: torch.Tensor, total: torch.Tensor, chosen: torch.Tensor | None
    ) -> Callable[[], int]:
        likely = torch.empty(ranks.shape, dtype=torch.bool, device=ranks.device)
        missed, misses = self._fetching.choose(ranks, counts, self._most, likely, listed=False)
        kept = likely if chosen is None else likely | chosen
        return self._fetching.make_room(likely, kept, missed, misses, total, listing=None)
