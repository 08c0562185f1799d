"""What decoding steps attended to: attention mass of chunks, counts, and the chunks themselves.

All of it stays on the device until it is read. State that one step leaves for the next is updated in place, because a
CUDA graph uses fixed addresses. Shapes: `n` dynamic heads, `N` chunks, `K` KV heads, `G` query heads per KV head, `D`
head dim.
"""

from __future__ import annotations

import torch

from tieredkv.cache.counters import Counters, Selection
from tieredkv.cache.layer_pages import LayerPages
from tieredkv.cache.ranking import Ranking
from tieredkv.memory.ledger import DeviceLedger
from tieredkv.memory.residency import Residency
from tieredkv.memory.units import FLOAT32, INT64
from tieredkv.planning.sizes import Layout
from tieredkv.policy import select


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


class EstimatedMass:
    """Attention mass estimated from the digests' logits: of what a step did not select, and of each chunk it did.

    Reading the chosen chunks' keys again would be exact, at several times the cost.
    """

    def __init__(self, ranking: Ranking, ledger: DeviceLedger, chunk_mass: torch.Tensor | None, tally: Tally) -> None:
        """chunk_mass: `(N,)`, to which each step adds the mass of the chunks it chose; None: not recorded."""
        self._ranking, self._ledger, self._chunk_mass, self._tally = ranking, ledger, chunk_mass, tally
        self.unseen = torch.zeros(len(ranking.digests), dtype=torch.float32, device=ranking.digests.device)
        """`(n,)`: share of attention mass that the last step did not see."""
        self._unselected: torch.Tensor | None = None
        """`(n, G)`: log of the mass of all chunks that the step under way did not choose."""
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        """Logits `(n, G, N)` of the step under way and their constant `(n, G)`, if chunk masses are recorded."""

    def drop(self) -> None:
        """Forget a step that was interrupted before `record`."""
        if self._kept is not None:
            self._kept = None
            self._ledger.release("logits")

    def note(self, logits: torch.Tensor, query: torch.Tensor, scaling: float, chosen: torch.Tensor) -> None:
        """Note a step's logits `(n, G, N)`, queries `(n, G, D)`, chosen chunks `(n, N)`; within `Ranking.scratch`."""
        constant = self._ranking.constant(query, scaling)
        self._unselected = self._ranking.ops.log_mass_without(logits, chosen) + constant
        if self._chunk_mass is not None:
            self._kept = logits, constant

    def hold(self) -> None:
        """Count the noted logits in the ledger, once they no longer count as ranking's scratch."""
        if self._kept is not None:
            self._ledger.reserve("logits", self._kept[0].nbytes)

    def record(self, lse: torch.Tensor, chosen: torch.Tensor) -> None:
        """Record the step noted last. lse `(n, G)`: of all logits it attended to. chosen `(n, N)`."""
        assert self._unselected is not None
        self.unseen.copy_(select.unseen_share(self._unselected, lse))
        self._tally.unseen += self.unseen
        if self._kept is None or self._chunk_mass is None:
            return
        (logits, constant), self._kept = self._kept, None
        self._ledger.release("logits")  # counted in the scratch from here on
        with self._ranking.scratch():
            whole = torch.logaddexp(self._unselected, lse)
            self._ranking.ops.add_mass(self._chunk_mass, logits, constant - whole, chosen)


class ExactMass:
    """Attention mass of chunks, from the log-sum-exp that attention leaves of each page: where digests are not used, or
    do not estimate mass."""

    def __init__(self, pages: LayerPages, heads: torch.Tensor, residency: Residency) -> None:
        """pages: the layer's. heads: `(n,)` KV heads. Each step adds to the phase's `chunk_mass`."""
        phase, self._heads, self._residency = pages.phase, heads, residency
        assert phase.page_lse is not None
        self.page_lse, self._chunk_mass, self._ledger = phase.page_lse, phase.chunk_mass, phase.ledger
        self._first, self._scratch_bytes = pages.first_selected, pages.scratch_bytes
        queries = phase.shape.num_attention_heads // phase.shape.num_key_value_heads
        per_slot = queries * (INT64 + 2 * FLOAT32) + 8 * INT64
        self._width = max(1, self._scratch_bytes // (len(heads) * per_slot))
        """Slots of each head handled at a time, whose masses and indices fit in the scratch of attention."""
        self._ranked = phase.plan.ranked
        """Whether steps attend to the chosen chunks only, not to all resident ones."""

    def record(self, lse: torch.Tensor) -> None:
        """Record a step that has just written `page_lse`. lse `(n, G)`: of all logits it attended to."""
        index = self._residency
        with self._ledger.scratch("scratch", self._scratch_bytes):
            (_, columns), group = self.page_lse.shape, lse.shape[1]
            rows = self._heads.unsqueeze(1) * group + torch.arange(group, device=lse.device)
            starts = (rows * columns + self._first).unsqueeze(-1)
            before = torch.zeros((len(lse), 1), dtype=torch.int64, device=lse.device)
            for first in range(0, index.slots.shape[1], self._width):
                resident = index.chunk_in[:, first : first + self._width].long()
                chunk, attended = resident.clamp(min=0), resident >= 0
                if self._ranked:
                    attended = attended & index.chosen.gather(1, chunk)
                    # The table lists the slots in use one after another, in the order of their numbers (`Ops.place`).
                    column = (before + attended.cumsum(1) - 1).clamp(min=0)
                    before = before + attended.sum(1, keepdim=True)
                else:
                    column = torch.arange(first, first + resident.shape[1], device=lse.device).expand_as(resident)
                logits = self.page_lse.take(starts + column.unsqueeze(1))
                mass = logits.sub_(lse.unsqueeze(-1)).exp_().sum(1)
                self._chunk_mass.index_add_(0, chunk.flatten(), torch.where(attended, mass, 0.0).flatten())


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
