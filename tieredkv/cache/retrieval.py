"""The dynamic heads of one layer while decoding: which chunks each step attends to, and in which slots they are.

Nothing here waits for the device, so that a step can be captured in a graph: counts stay there until
`flush_counters` is called.
Shapes: `n` dynamic heads, `N` chunks, `R` retrieval slots per head, `G` query heads per KV head, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tieredkv.cache.counters import Selection
from tieredkv.cache.decode_phase import DecodePhase
from tieredkv.memory.host import HostLayer
from tieredkv.memory.residency import Residency
from tieredkv.ops import torch_ops
from tieredkv.ops.packing import Packing
from tieredkv.ops.select import TORCH
from tieredkv.planning.sizes import chunk_bytes, ranked_chunks_at_once, ranking_bytes, reuse_bytes, scratch_page_bytes
from tieredkv.policy import select
from tieredkv.policy.digests import vectors
from tieredkv.policy.digests.sketch import Basis

MOST_CHUNK_TOKENS = 128
"""Chunks of more tokens, or of a number that is no power of two, are ranked by torch on a card too."""


class Retrieval:
    """Ranks, fetches and keeps chunks. Chunk ids count from the first chunk behind the sinks."""

    def __init__(
        self,
        index: int,
        host: HostLayer,
        heads: torch.Tensor,
        digests: torch.Tensor,
        basis: Basis | None,
        saliency: torch.Tensor,
        table: torch.Tensor,
        first_column: int,
        phase: DecodePhase,
        packing: Packing | None,
    ) -> None:
        """heads: `(n,)` KV heads. digests: uint8 `(K, >= old chunks, bytes)` on the host. saliency: `(K, tokens)`.

        table: `(K, P)`: the layer's page table, whose rows `heads` get the selected chunks' slots from `first_column`
        on. packing: the layer's, of packed pages. Takes its slots from the pool and fills them with the chunks the
        question's rows looked at most.
        """
        self.index, self.host, self.heads, self.phase = index, host, heads, phase
        self._packing = packing
        layout, plan, device = phase.plan.layout, phase.plan, phase.pool.pages.device
        self._c, self._first, self._chunks = host.chunk_tokens, layout.sink_chunks, layout.retrievable
        self._table, self._column = table, first_column
        self.steps = 0
        """Taken since they were last counted, by whoever takes them."""
        self._at_once = ranked_chunks_at_once(phase.shape, phase.tiers, layout)
        self._sketch_logits = phase.ops.sketch_logits
        if self._c & (self._c - 1) or self._c > MOST_CHUNK_TOKENS:
            self._sketch_logits = TORCH.sketch_logits
        n = len(heads)
        self._rows = heads.to(device)
        self.selected = plan.selected[index, heads].to(device)
        """`(n,)`: chunks each head attends to."""
        self.slots = plan.slots[index, heads].to(device)
        """`(n,)`: slots each head has."""
        self._least = self.selected.clone()
        self._most_slots = int(self.slots.max())
        self.most_selected = self._most_slots if phase.tiers.adaptive else int(self.selected.max())
        """Columns of the table that may be used."""
        ahead = torch.minimum(self.slots - self.selected, self.selected)
        reuse = phase.tiers.policy.reuse_above <= 1
        self._ahead = ahead if phase.prefetcher is not None and reuse and bool(ahead.any()) else None
        """`(n,)`: chunks each head may fetch for the step after."""
        self._most_ahead = int(ahead.max())
        self._query: torch.Tensor | None = None
        """`(n, G, D)` of the step before, where chunks may be reused."""
        self._unselected: torch.Tensor | None = None
        """`(n, G)`: log of the attention mass of what this step did not select, as far as digests tell."""
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        """Logits `(n, G, N)` of this step and what all of them lack `(n, G)`, until what it attends to is recorded."""
        self._unseen: torch.Tensor | None = None
        """`(n,)`: share of attention mass that the step before did not see. Like all that one step leaves to the next,
        it stays where it is: a graph reads and writes it there."""
        self._clock = torch.zeros(1, dtype=torch.int32, device=device)
        self._selected, self._missed, self._reused, self._fetched = torch.zeros(
            (4, n), dtype=torch.int64, device=device
        )
        """`(n,)`: chunks selected (if their number changes), missed, reused, fetched ahead; not yet counted."""
        self._unseen_sum = torch.zeros(n, dtype=torch.float64, device=device)
        phase.ledger.reserve("tables", Residency.bytes_for(n, self._most_slots, self._chunks))
        phase.ledger.reserve("tables", reuse_bytes(phase.shape, phase.tiers, n))
        slots = torch.full((n, self._most_slots), -1, dtype=torch.int64, device=device)
        place = torch.arange(self._most_slots, device=device)
        slots[place < self.slots.unsqueeze(1)] = phase.pool.take(int(self.slots.sum()))
        self.residency = Residency(slots, self._chunks)
        self._warm(saliency)
        self.digests: torch.Tensor | None = None
        if plan.ranked:
            shape = (n, self._chunks, digests.shape[2])
            self.digests = phase.ledger.empty("digests", shape, digests.dtype, device)
            self.digests.copy_(digests[heads, self._first : self._first + self._chunks])
            phase.counters.warm_bytes += self.digests.numel() * self.digests.itemsize
            self._basis = None if basis is None else basis.for_ranking(heads).to(device)
            if self._basis is not None:
                phase.ledger.reserve("digests", self._basis.nbytes)
        else:  # all that there is is attended to in every step
            table[self._rows, first_column : first_column + self._most_slots] = self.residency.slots

    @property
    def ranking_bytes(self) -> int:
        """Device bytes of what chunks are ranked by."""
        return sum(part.nbytes for part in (self.digests, self._basis) if part is not None)

    def _warm(self, saliency: torch.Tensor) -> None:
        if self._most_slots == 0:
            return
        first, n = self._first * self._c, len(self.heads)
        mass = saliency[self.heads, first : first + self._chunks * self._c].view(n, self._chunks, self._c).sum(-1)
        likely = mass.topk(self._most_slots, dim=-1).indices.to(self.residency.slots.device)
        self.residency.enter(likely)
        row, place = (self.residency.slots >= 0).nonzero(as_tuple=True)
        phase = self.phase
        slots = self.residency.slots[row, place]
        chunks = likely[row, place] + self._first
        phase.ops.fetch(self.host.arena, phase.pool.pages, self._rows[row], chunks, slots, self._packing)
        phase.counters.warm_bytes += len(slots) * chunk_bytes(phase.shape, phase.tiers)

    # ---- steps

    def logits(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Estimated logits `(n, rows, N)` of every chunk, for queries `(K, rows, D)` of any number of steps."""
        assert self.digests is not None
        method = self.phase.tiers.policy
        scaled = query[self._rows].float() * scaling
        if self._basis is None:

            def of(part: torch.Tensor) -> torch.Tensor:
                return vectors.DIGESTS[method.digest].logits(scaled, part, method.digest_bits, None)
        else:
            small = scaled @ self._basis.up

            def of(part: torch.Tensor) -> torch.Tensor:
                return self._sketch_logits(small, part, method.digest_bits, self._c)

        if self._basis is not None and self._sketch_logits is not TORCH.sketch_logits:
            return of(self.digests)  # a kernel unpacks nothing
        parts = [of(part) for part in self.digests.split(self._at_once, dim=1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def step(self, query: torch.Tensor, scaling: float, logits: torch.Tensor | None = None) -> None:
        """Choose the chunks that this step attends to, fetch those that are missing, and list their slots in the table.

        query `(K, G, D)`. logits `(n, G, N)`: the query's, if they are known already. Where nothing is to be chosen,
        nothing happens.
        """
        if self.digests is None:
            return
        phase, index = self.phase, self.residency
        ops, method = phase.ops, phase.tiers.policy
        if phase.prefetcher is not None:
            phase.prefetcher.wait(self.index)
        if self._kept is not None:  # of a step that broke off
            self._kept = None
            phase.ledger.release("logits")
        grouped = query[self._rows].float()
        self._clock += 1
        with phase.ledger.scratch("ranking", ranking_bytes(phase.shape, phase.tiers, phase.plan.layout)):
            if logits is None:
                logits = self.logits(query, scaling)
            ranks = ops.chunk_ranks(logits, index.chosen, method.chunk_group, method.stay)
            own = self._reusing(ranks, grouped)
            chosen, missed, misses = ops.choose(own, self.selected, index.slot_of, self.most_selected)
            if self._basis is not None:
                centre = (grouped * scaling @ self._basis.centre.mT).squeeze(-1)
                self._unselected = select.log_mass_without(logits, chosen) + centre
                if phase.looks is not None:
                    self._kept = logits, centre
        if self._kept is not None:
            phase.ledger.reserve("logits", logits.nbytes)
        index.chosen.copy_(chosen)
        table = self._table, self._rows, self._column
        self._gather(chosen, chosen, missed, misses, table)()
        self._missed += misses
        if phase.tiers.adaptive:
            self._selected += self.selected
        if phase.counters.trace is not None:
            self._trace(chosen, query)
        if self._ahead is not None:
            assert phase.prefetcher is not None
            likely, missed, misses = ops.choose(ranks, self._ahead, index.slot_of, self._most_ahead)
            self._fetched += misses
            phase.prefetcher.submit(self.index, self._gather(likely, likely | chosen, missed, misses, None))

    def _reusing(self, ranks: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Ranks by which a head whose query is like the one before takes the chunks of the step before again."""
        reuse_above = self.phase.tiers.policy.reuse_above
        if reuse_above > 1:
            return ranks
        if self._query is None:
            self._query = query.clone()
            return ranks
        alike = select.query_similarity(query, self._query) >= reuse_above
        self._query.copy_(query)
        self._reused += alike * self.selected
        return torch.where(alike.unsqueeze(1), self.residency.chosen.float(), ranks)

    def _gather(
        self,
        wanted: torch.Tensor,
        kept: torch.Tensor,
        missed: torch.Tensor,
        misses: torch.Tensor,
        table: tuple[torch.Tensor, torch.Tensor, int] | None,
    ) -> Callable[[], int]:
        """Make room for missed chunks; the copy, as a deferred call. table: what lists the wanted chunks' slots.

        The bytes that the call tells are none: what was copied is counted on the device.
        """
        index, phase, most = self.residency, self.phase, missed.shape[1]
        page_table, rows, column = (None, self._rows, 0) if table is None else table
        used = index.chunk_in, index.last_used, index.slots
        victims = phase.ops.place(wanted, kept, misses, *used, self._clock, most, page_table, rows, column)
        tables = index.slots, index.chunk_in, index.slot_of
        to = self.host.arena, phase.pool.pages, self._rows

        def copy() -> int:
            phase.ops.gather(*to, missed, victims, misses, *tables, self._first, self._packing)
            return 0

        return copy

    def record_step(self, query: torch.Tensor, scaling: float, lse: torch.Tensor) -> None:
        """Take note of what the step saw: its query `(K, G, D)`, log-sum-exp `(K, G)` of the logits it attended to."""
        seen = lse[self._rows]
        if self._unselected is not None:
            unseen = select.unseen_share(self._unselected, seen)
            self._unseen = unseen if self._unseen is None else self._unseen.copy_(unseen)
            self._unseen_sum += self._unseen
        if self._kept is not None:
            self._record_estimated(*self._kept, seen)
        elif self.phase.looks is not None:
            self._record_exact(query[self._rows], scaling, seen)

    def _record_estimated(self, logits: torch.Tensor, centre: torch.Tensor, seen: torch.Tensor) -> None:
        """Add the attention that each chosen chunk got to what the step attended to, as far as sketches tell.

        Reading the chosen chunks' keys once more would be exact, and several times the work.
        """
        assert self._unselected is not None
        phase, self._kept = self.phase, None
        phase.ledger.release("logits")  # counted with the rest from here
        with phase.ledger.scratch("ranking", ranking_bytes(phase.shape, phase.tiers, phase.plan.layout)):
            whole = torch.logaddexp(self._unselected, seen)
            mass = (logits + (centre - whole).unsqueeze(-1)).exp_().sum(1)
            phase.chunk_mass.add_(mass.mul_(self.residency.chosen).sum(0))

    def _record_exact(self, query: torch.Tensor, scaling: float, seen: torch.Tensor) -> None:
        """The same from the keys in the pool, where chunks are not ranked, or by what does not tell attention."""
        phase, index, packing = self.phase, self.residency, self._packing
        if packing is not None:
            packing = Packing(packing.scales, packing.norms[self._rows])
        pages = min(phase.plan.scratch_pages, self._table.numel())
        page = scratch_page_bytes(phase.shape, phase.tiers, packing is not None)
        with phase.ledger.scratch("scratch", pages * page):
            width = max(1, pages // len(self.heads))
            for first in range(0, self._most_slots, width):
                part = slice(first, first + width)
                held = index.chunk_in[:, part].long()
                chunk, attended = held.clamp(min=0), held >= 0
                if self.digests is not None:
                    attended = attended & index.chosen.gather(1, chunk)
                mass = torch_ops.page_mass(query, phase.pool.pages, index.slots[:, part], seen, scaling, packing)
                phase.chunk_mass.index_add_(0, chunk.flatten(), torch.where(attended, mass, 0.0).flatten())

    def adapt(self) -> bool:
        """Change how many chunks heads select, by what the step before did not see; whether anything could change."""
        if self._unseen is None:
            return False
        self.selected.copy_(select.adapted(self.selected, self._unseen, self._least, self.slots))
        return True

    # ---- what happened

    def flush_counters(self) -> None:
        """Add what happened since the last time to the counters. Waits for the device."""
        counters = self.phase.counters
        if self.digests is not None and not self.phase.tiers.adaptive:
            self._selected += self.steps * self.selected
        tallies = self._selected, self._missed, self._reused, self._fetched
        selected, missed, reused, ahead = torch.stack(tallies).sum(1).tolist()
        page = chunk_bytes(self.phase.shape, self.phase.tiers)
        counters.selected += selected
        counters.resident += selected - missed
        counters.reused += reused
        counters.missed_bytes += missed * page
        counters.prefetched_bytes += ahead * page
        if self._unseen is not None:
            counters.unseen_sum += float(self._unseen_sum.sum())
            counters.unseen_count += self.steps * len(self.heads)
        for tally in (*tallies, self._unseen_sum):
            tally.zero_()
        self.steps = 0

    def _trace(self, chosen: torch.Tensor, query: torch.Tensor) -> None:
        place = torch.arange(self.most_selected, device=chosen.device)
        ids = chosen.int().sort(dim=1, descending=True, stable=True).indices[:, : self.most_selected]
        first = torch.where(place < self.selected.unsqueeze(1), (ids + self._first) * self._c, -1)
        assert self.phase.counters.trace is not None
        self.phase.counters.trace.append(Selection(int(self._clock), self.index, self.heads, first, query))
