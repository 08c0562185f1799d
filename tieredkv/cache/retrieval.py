"""The dynamic heads of one layer while decoding: which chunks each step attends to, and in which slots they are.

Nothing here waits for the device but `flush_counters` and a trace, so that a step can be captured in a CUDA graph.
Shapes: `n` dynamic heads, `N` chunks, `K` KV heads, `G` query heads per KV head, `D` head dim, `P` columns of the page
table.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tieredkv.cache.fetching import FetchAhead, Fetching
from tieredkv.cache.layer_pages import LayerPages
from tieredkv.cache.ranking import ChunkLogits, Ranking, Reuse
from tieredkv.cache.recording import ChunkMass, Tally, Trace, UnseenMass
from tieredkv.environment.threads import at_most
from tieredkv.planning import sizes
from tieredkv.policy import select
from tieredkv.policy.digests import Fitted


class Retrieval:
    """Chooses, fetches and records chunks; `ranking` is None if every step attends to all of them.

    Chunk ids count from the first chunk after the sinks.
    """

    def __init__(
        self,
        index: int,
        pages: LayerPages,
        heads: torch.Tensor,
        digests: torch.Tensor,
        fitted: Fitted | None,
        saliency: torch.Tensor,
    ) -> None:
        """pages: the layer's, whose table lists the selected chunks' slots in the rows of `heads`, `(n,)` KV heads.
        digests: uint8 `(K, >= old chunks, bytes)` on the host, made with `fitted`. saliency: `(K, tokens)`.

        Takes its slots from the pool and fills them with the chunks that the question's rows attended to most.
        """
        phase, device = pages.phase, pages.device
        tiers, plan, shape, ledger, policy = phase.tiers, phase.plan, phase.shape, phase.ledger, phase.tiers.policy
        slots, selected = plan.slots[index, heads], plan.selected[index, heads]
        self.heads, self.selected = (part.to(device, non_blocking=True) for part in (heads, selected.clone()))
        """`(n,)` each: KV heads; and how many chunks each attends to."""
        self.most_selected = int((slots if tiers.adaptive else selected).max())
        """Columns of the table that may be used."""
        self.steps = 0
        """Since counters were flushed. Set by `advance` and `go_back`, so that steps replayed from a graph count."""
        self._limits = (self.selected.clone(), slots.to(device, non_blocking=True)) if tiers.adaptive else None
        """`(n,)` each: fewest and most chunks that an adaptive head may select; None: heads are not adaptive."""
        self._ops, self._lengths, self._chunk_tokens = phase.ops, pages.lengths, plan.layout.chunk_tokens
        self._counters, self._chunk_bytes = phase.counters, pages.host.codec.chunk_bytes
        self._tally = Tally(len(heads), device)
        first = self._first_chunks(saliency[heads], plan.layout, int(slots.max()), plan.ranked)
        self._fetching = Fetching(pages, heads, slots, first, listed=not plan.ranked)
        self.residency = self._fetching.residency

        self.ranking: Ranking | None = None
        self._reuse: Reuse | None = None
        self._ahead: FetchAhead | None = None
        """Copies chunks for the next step, if heads may reuse this step's choice; if not, for a step foreseen."""
        self._unseen: UnseenMass | None = None
        self._recorded: ChunkMass | None = None
        self._trace: Trace | None = None
        if plan.ranked:
            assert fitted is not None  # there are chunks, and they have digests
            self.ranking = Ranking(digests, fitted, heads, phase)
            self._counters.warm_bytes += self.ranking.digests.nbytes
            if self.ranking.digest.estimates_mass:
                self._unseen = UnseenMass(self.heads, self._ops, self._tally)
            if policy.reuse_above <= 1:
                group = shape.num_attention_heads // shape.num_key_value_heads
                self._reuse = Reuse(policy.reuse_above, (len(heads), group, shape.head_dim), ledger, device)
                spare = torch.minimum(slots - selected, selected)
                self._spare = spare.to(device, non_blocking=True)
                if phase.prefetcher is not None and bool(spare.any()):
                    self._ahead = FetchAhead(self._fetching, int(spare.max()), phase.prefetcher, index)
            elif phase.prefetcher is not None and phase.foreseen:
                self._slots = slots.to(device, non_blocking=True)
                self._per_cent = plan.ahead_per_cent
                self._counts = select.likely_counts(self.selected, self._slots, self._per_cent)
                self._ahead = FetchAhead(self._fetching, int(slots.max()), phase.prefetcher, index)
            if phase.counters.trace is not None:
                self._trace = Trace(phase.counters.trace, index, heads, plan.layout)
        if phase.looks is not None:
            self._recorded = ChunkMass(phase, self.residency, self._fetching.listing)

    @staticmethod
    def _first_chunks(saliency: torch.Tensor, layout: sizes.Layout, most: int, ranked: bool) -> torch.Tensor:
        """The `most` chunks that the question's rows attended to most, `(n, most)`; all of them in order where chunks
        are not ranked. saliency: `(n, tokens)`."""
        if not ranked:
            return torch.arange(most, device="cpu").expand(len(saliency), -1)
        c, first = layout.chunk_tokens, layout.sink_chunks * layout.chunk_tokens
        chunks = saliency[:, first : first + layout.retrievable * c].unflatten(1, (layout.retrievable, c))
        return chunks.sum(-1).topk(most, dim=-1).indices

    def _adapt(self) -> None:
        """Adapt how many chunks heads select, and so attend to, to the mass the last step did not see."""
        if self._limits is None or self._unseen is None:
            return
        (least, most), first = self._limits, self._fetching.listing.first
        unseen, total = self._unseen.unseen, self._tally.selected
        self._ops.adapt(
            self.selected, unseen, least, most, total,
            self._lengths, self.heads, first, self.most_selected, self._chunk_tokens,
        )  # fmt: skip

    def step(self, query: torch.Tensor, scaling: float, logits: ChunkLogits | None = None) -> None:
        """Choose the chunks that this step attends to, fetch those that are missing, and list their slots in the table.

        query `(K, G, D)`. logits: of `ranking`, if they are known already. Does nothing where chunks are not ranked.
        """
        if self.ranking is None:
            return
        if self._ahead is not None:
            self._ahead.wait()
        self._adapt()
        fetching, chosen = self._fetching, self.residency.chosen
        with self.ranking.scratch():
            if logits is None:
                logits = self.ranking.logits(query, scaling)
            own = ranks = self.ranking.ranks(logits, chosen)
            if self._reuse is not None:
                own, alike = self._reuse.ranks(ranks, query[self.heads].float(), chosen)
                self._tally.reused += alike * self.selected
            missed, misses = fetching.choose(own, self.selected, self.most_selected, chosen, listed=True)
            if self._unseen is not None:
                self._unseen.note(logits, chosen)
        fetching.make_room(chosen, chosen, missed, misses, self._tally.missed, fetching.listing)()
        if self._trace is not None:
            self._trace.record(int(fetching.step[0]), chosen, self.selected, self.most_selected, query)
        if self._ahead is not None and self._reuse is not None:
            self._ahead.start(ranks, self._spare, self._tally.ahead, chosen)

    @property
    def foresees(self) -> bool:
        """Whether chunks are copied for a query that is predicted."""
        return self._ahead is not None and self._reuse is None

    def foresee(self, query: Callable[[], torch.Tensor], scaling: float) -> None:
        """Copy in the background what a step with the query `query()`, `(K, G, D)`, would fetch, and a little more.

        Changes no choice: where chunks are does not matter to ranks. What the step will choose is not known yet, so
        every slot may be given away that holds none of the likely chunks. All of it runs in the background, and is over
        before the step reads the layer's tables: until then nothing else touches them, nor the scratch of ranking.
        """
        ranking = self.ranking
        assert ranking is not None
        assert self._ahead is not None

        def rank() -> torch.Tensor:
            with at_most(1), ranking.scratch():  # one thread: others compute the MLP meanwhile
                return ranking.ranks(ranking.logits(query(), scaling), self.residency.chosen)

        counts = (
            self._counts if self._limits is None else select.likely_counts(self.selected, self._slots, self._per_cent)
        )
        self._ahead.start_ranking(rank, counts, self._tally.ahead)

    @property
    def page_lse(self) -> torch.Tensor | None:
        """Where a step's attention is to write the log-sum-exp of each page, `(H, P)`; None: nobody reads it."""
        return None if self._recorded is None else self._recorded.page_lse

    def record_step(self, lse: torch.Tensor) -> None:
        """Record what a step attended to. lse `(K, G)`: of all logits it attended to."""
        if self._unseen is not None:
            self._unseen.record(lse)
        if self._recorded is not None:
            self._recorded.record(lse)

    def advance(self) -> None:
        """Count a step."""
        self.steps += 1

    def go_back(self, steps: int) -> None:
        """Count only `steps` steps since the counters were flushed."""
        self.steps = steps

    def flush_counters(self) -> None:
        """Add what happened since the last flush to the counters. Waits for the device."""
        if self.ranking is not None:
            if self._limits is None:  # the same in every step
                self._tally.selected += self.steps * self.selected
            if self._unseen is not None:
                self._counters.unseen_count += self.steps * len(self.selected)
            self._tally.flush(self._counters, self._chunk_bytes)
        self.steps = 0
