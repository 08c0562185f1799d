"""The dynamic heads of one layer while decoding: which chunks each step attends to, and in which slots they are.

Shapes: `n` dynamic heads, `m` chunks selected, `R` retrieval slots per head, `G` query heads per KV head, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tieredkv.memory.host import HostLayer
from tieredkv.memory.pool import Residency
from tieredkv.policy import digest, select
from tieredkv.policy.sketch import Basis
from tieredkv.sizes import choice_bytes, page_bytes, ranked_chunks_at_once, ranking_bytes
from tieredkv.stats import Selection
from tieredkv.tiers import Tiers


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
        tiers: Tiers,
    ) -> None:
        """heads: `(n,)` KV heads. digests: uint8 `(K, >= old chunks, bytes)` on the host. saliency: `(K, N)`.

        Takes its slots from the pool and fills them with the chunks the question's rows looked at most.
        """
        self.index, self.host, self.heads, self.tiers = index, host, heads, tiers
        layout, plan, device = tiers.plan.layout, tiers.plan, tiers.pool.pages.device
        self._c, self._first, self._chunks = host.chunk_tokens, layout.sink_chunks, layout.retrievable
        self._clock = 0
        self._at_once = ranked_chunks_at_once(tiers.shape, tiers.config, layout)
        n = len(heads)
        self.selected = plan.selected[index, heads].unsqueeze(1).to(device)
        """`(n, 1)`: chunks each head attends to."""
        self.slots = plan.slots[index, heads].unsqueeze(1).to(device)
        """`(n, 1)`: slots each head has."""
        self._least = self.selected
        self._most_slots = int(self.slots.max())
        self._most_selected = self._most_slots if tiers.config.adaptive else int(self.selected.max())
        self._count_selected()
        self._chosen: torch.Tensor | None = None
        """`(n, m)` int32: chunks that the step before attended to."""
        self._unselected: torch.Tensor | None = None
        """`(n, G)`: log of the attention mass of what this step did not select, as far as digests tell."""
        self._unseen: torch.Tensor | None = None
        """`(n,)`: share of attention mass that the step before did not see."""
        tiers.ledger.reserve("tables", Residency.bytes_for(n, self._most_slots, self._chunks))
        tiers.ledger.reserve("tables", choice_bytes(tiers.shape, tiers.config, n, self._most_selected))
        table = torch.full((n, self._most_slots), -1, dtype=torch.int64, device=device)
        table[torch.arange(self._most_slots, device=device) < self.slots] = tiers.pool.take(int(self.slots.sum()))
        self.residency = Residency(table, self._chunks)
        self._warm(saliency)
        self.digests: torch.Tensor | None = None
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None
        """Query and best chunks of the step before, where chunks may be reused."""
        if plan.ranked:
            shape = (n, self._chunks, digests.shape[2])
            self.digests = tiers.ledger.empty("digests", shape, digests.dtype, device)
            self.digests.copy_(digests[heads, self._first : self._first + self._chunks])
            tiers.counters.warm_bytes += self.digests.numel() * self.digests.itemsize
            self.basis = None if basis is None else basis.for_ranking(heads)
            if self.basis is not None:
                tiers.ledger.reserve("digests", self.basis.nbytes)

    def _warm(self, saliency: torch.Tensor) -> None:
        if self._most_slots == 0:
            return
        first, n = self._first * self._c, len(self.heads)
        mass = saliency[self.heads, first : first + self._chunks * self._c].view(n, self._chunks, self._c).sum(-1)
        likely = select.ranked_chunks(mass, self._most_slots).to(self.residency.slots.device)
        likely = select.only(likely, 0, self.slots)
        # Worst first: of slots used equally long ago, the first gives way.
        local, _ = self.residency.admit(likely.flip(1), self._clock)
        self.tiers.counters.warm_bytes += self._copy(likely.flip(1), local, local >= 0)()

    def _copy(self, ids: torch.Tensor, local: torch.Tensor, mask: torch.Tensor) -> Callable[[], int]:
        """The copy of chunks `ids` `(n, m)` into local slots, where `mask` is set, as a deferred call."""
        row, column = mask.nonzero(as_tuple=True)
        heads, slots = self.heads[row], self.residency.slots[row, local[row, column]]
        ids = ids[row, column] + self._first
        transfer, pages = self.tiers.transfer, self.tiers.pool.pages
        return lambda: transfer.gather(self.host.chunks(), heads, ids, pages, slots)

    def logits(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Estimated logits `(n, rows, chunks)` of every chunk, for queries `(K, rows, D)` of any number of steps."""
        assert self.digests is not None
        method = self.tiers.config.method
        kind, scaled = digest.DIGESTS[method.digest], query[self.heads].float() * scaling
        parts = [
            kind.logits(scaled, part, method.digest_bits, self.basis)
            for part in self.digests.split(self._at_once, dim=1)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def slots_for(self, query: torch.Tensor, scaling: float, logits: torch.Tensor | None = None) -> torch.Tensor:
        """Pool slots `(n, m)` of the chunks that this step attends to, all of them filled. query `(K, G, D)`.

        A head's own number of them comes first in its row; what follows is any slot. logits `(n, G, chunks)`: the
        query's, if they are known already.
        """
        tiers, plan = self.tiers, self.tiers.plan
        self._clock += 1
        if self.digests is None:
            return self.residency.slots
        if tiers.prefetcher is not None:
            tiers.counters.prefetched_bytes += tiers.prefetcher.wait(self.index)
        grouped = query[self.heads]
        method = tiers.config.method
        with tiers.ledger.scratch("ranking", ranking_bytes(tiers.shape, tiers.config, plan.layout)):
            if logits is None:
                logits = self.logits(query, scaling)
            share = select.GROUPS[method.chunk_group](logits)
            if method.stay > 1 and self._chosen is not None:
                share = select.favoured(share, self._chosen.long(), method.stay)
            ranked = select.ranked_chunks(share, self._most_slots)
            wanted = self._wanted(grouped, ranked[:, : self._most_selected].masked_fill(self._beyond, -1))
            if self.basis is not None:
                centre = (grouped.float() * scaling @ self.basis.centre.mT).squeeze(-1)
                self._unselected = select.log_mass_without(logits, wanted) + centre
        self._chosen = wanted.int()
        local, miss = self.residency.admit(wanted, self._clock)
        moved = self._copy(wanted, local, miss)()
        tiers.counters.missed_bytes += moved
        tiers.counters.selected += self._selected_sum
        tiers.counters.resident += self._selected_sum - moved // page_bytes(tiers.shape, tiers.config)
        if tiers.counters.trace is not None:
            first = torch.where(wanted < 0, -1, (wanted + self._first) * self._c)
            tiers.counters.trace.append(Selection(self._clock, self.index, self.heads, first, query))
        self._fetch_ahead(ranked, local)
        return self.residency.slots.gather(1, local.clamp(min=0))

    def attended(self, lse: torch.Tensor) -> None:
        """Take note of what the step saw: log-sum-exp `(K, G)` of the logits it attended to."""
        if self._unselected is None:
            return
        self._unseen = select.unseen_share(self._unselected, lse[self.heads])
        counters = self.tiers.counters
        counters.unseen_sum = counters.unseen_sum + self._unseen.sum()  # on the device: nobody waits for it
        counters.unseen_count += self._unseen.numel()

    def adapt(self) -> bool:
        """Change how many chunks heads select, by what the step before did not see; whether anything changed."""
        if self._unseen is None:
            return False
        before = self.selected
        self.selected = select.adapted(self.selected, self._unseen, self._least, self.slots)
        self._count_selected()
        return not torch.equal(before, self.selected)

    def _count_selected(self) -> None:
        place = torch.arange(self._most_selected, device=self.selected.device)
        self._beyond, self._selected_sum = place >= self.selected, int(self.selected.sum())

    def _wanted(self, query: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        """The chunks `(n, m)` to attend to: the best of this step, or of the step before where its query was alike."""
        reuse_above = self.tiers.config.method.reuse_above
        if reuse_above > 1:
            return best
        before, self._before = self._before, (query, best.int())
        if before is None:
            return best
        alike = select.query_similarity(query, before[0]) >= reuse_above
        self.tiers.counters.reused += int((alike.unsqueeze(1) * self.selected).sum())
        return torch.where(alike.unsqueeze(1), before[1].long(), best)

    def _fetch_ahead(self, ranked: torch.Tensor, local: torch.Tensor) -> None:
        """Start copying what the next step attends to if its query is alike, into slots this step does not read."""
        tiers, spare = self.tiers, self.slots - self.selected
        if tiers.prefetcher is None or tiers.config.method.reuse_above > 1 or not bool(spare.any()):
            return
        likely = select.only(ranked, 0, torch.minimum(spare, self.selected))
        ahead, absent = self.residency.admit(likely, self._clock, protected=local)
        tiers.prefetcher.submit(self.index, self._copy(likely, ahead, absent))
