"""What decoding steps attended to: attention mass of chunks, counts, and the chunks themselves.

All of it stays on the device until it is read. State that one step leaves for the next is updated in place, because a
CUDA graph uses fixed addresses. Shapes: `n` dynamic heads, `N` chunks, `K` KV heads, `G` query heads per KV head, `D`
head dim.
"""

from __future__ import annotations

import torch

from tieredkv.cache.counters import Counters, Selection
from tieredkv.cache.decode_phase import DecodePhase
from tieredkv.cache.ranking import ChunkLogits
from tieredkv.memory.residency import Residency
from tieredkv.ops.base import Listing, Ops
from tieredkv.planning.sizes import Layout


class Tally:
    """Counts of one layer's dynamic heads since the last flush, `(n,)` each."""

    def __init__(self, heads: int, device: torch.device) -> None:
        self._counts = torch.zeros((4, heads), dtype=torch.int64, device=device)
        self.selected, self.missed, self.reused, self.ahead = self._counts
        self.unseen = torch.zeros(heads, dtype=torch.float64, device=device)
        """Sum over steps of the share of attention mass that was not seen."""

    def flush(self, counters: Counters, chunk_bytes: int) -> None:
        """Add the counts to `counters` and reset them. Waits for the device."""
        selected, missed, reused, ahead = self._counts.sum(1).tolist()
        counters.selected += selected
        counters.resident += selected - missed
        counters.reused += reused
        counters.missed_bytes += missed * chunk_bytes
        counters.prefetched_bytes += ahead * chunk_bytes
        counters.unseen_sum += float(self.unseen.sum())
        self._counts.zero_()
        self.unseen.zero_()


class UnseenMass:
    """The share of attention mass that steps did not see, estimated from the digests' logits."""

    def __init__(self, heads: torch.Tensor, ops: Ops, tally: Tally) -> None:
        """heads: `(n,)` KV heads."""
        self._heads, self._ops, self._tally = heads, ops, tally
        self.unseen = torch.zeros(len(heads), dtype=torch.float32, device=heads.device)
        """`(n,)`: of the last step."""
        self._unselected: torch.Tensor | None = None
        """`(n, G)`: log of the mass of all chunks that the step under way did not choose."""

    def note(self, logits: ChunkLogits, chosen: torch.Tensor) -> None:
        """Note a step's logits and the chunks it chose, `(n, N)`; within `Ranking.scratch`."""
        self._unselected = self._ops.log_mass_without(logits.each, chosen, logits.constant)

    def record(self, lse: torch.Tensor) -> None:
        """Record the step noted last. lse `(K, G)`: of all logits it attended to."""
        assert self._unselected is not None
        self._ops.record_unseen(self._unselected, lse, self._heads, self.unseen, self._tally.unseen)


class ChunkMass:
    """Attention mass of chunks, from the log-sum-exp that attention leaves of each page."""

    def __init__(self, phase: DecodePhase, residency: Residency, listing: Listing) -> None:
        """residency, listing: of the layer's dynamic heads. Each step adds to the phase's `chunk_mass`."""
        assert phase.page_lse is not None
        self.page_lse, self._chunk_mass, self._ops = phase.page_lse, phase.chunk_mass, phase.ops
        self._residency, self._listing = residency, listing

    def record(self, lse: torch.Tensor) -> None:
        """Record a step that has just written `page_lse`. lse `(K, G)`: of all logits it attended to."""
        listing = self._listing
        where = listing.order, listing.heads, listing.first
        self._ops.add_mass(self._chunk_mass, self.page_lse, lse, self._residency.chosen, *where)


class Trace:
    """Keeps which chunks every step attended to. Waits for the device in each step."""

    def __init__(self, selections: list[Selection], layer: int, heads: torch.Tensor, layout: Layout) -> None:
        """selections: each step appends one. heads: `(n,)` on the host."""
        self._selections, self._layer, self._heads, self._layout = selections, layer, heads, layout

    def record(self, step: int, chosen: torch.Tensor, selected: torch.Tensor, most: int, query: torch.Tensor) -> None:
        """Record a step's chosen chunks `(n, N)`, `selected` `(n,)` of each head, and queries `(K, G, D)`."""
        place = torch.arange(most, device=chosen.device)
        ids = chosen.int().sort(dim=1, descending=True, stable=True).indices[:, :most]
        first_token = (ids + self._layout.sink_chunks) * self._layout.chunk_tokens
        first = torch.where(place < selected.unsqueeze(1), first_token, -1)
        self._selections.append(Selection(step, self._layer, self._heads, first, query))
