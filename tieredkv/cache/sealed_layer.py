"""SealedLayer: one layer while decoding, and the step that selects, fetches and attends.

Shapes: `K` KV heads, `H` query heads, `n` tokens, `N` prompt tokens, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tieredkv.attention import exact
from tieredkv.cache.decode_phase import DecodePhase
from tieredkv.cache.layer_pages import LayerPages
from tieredkv.cache.prefill import TextRows
from tieredkv.cache.ranking import ChunkLogits
from tieredkv.cache.retrieval import Retrieval
from tieredkv.environment.threads import at_most, worth
from tieredkv.memory.host import HostLayer
from tieredkv.planning.decode_plan import table_width
from tieredkv.planning.sizes import ranked_ahead_bytes, ranking_bytes
from tieredkv.policy.correction import Correction
from tieredkv.policy.digests import Fitted

MOST_ROWS = 32
"""Steps whose chunks are ranked in one pass."""


@dataclass(frozen=True, slots=True)
class LayerPosition:
    """How far a layer has decoded, as counted in Python."""

    generated: int
    steps: int
    """Retrieval steps since its counters were flushed."""


class SealedLayer:
    """Pages and retrieval of one layer; alive from the seal until the cache takes prompt tokens again or closes."""

    def __init__(
        self,
        index: int,
        host: HostLayer,
        digests: torch.Tensor,
        fitted: Fitted | None,
        static: torch.Tensor,
        rows: TextRows,
        is_text: torch.Tensor,
        phase: DecodePhase,
        correction: Correction | None = None,
    ) -> None:
        """host: all prompt tokens. digests: `(K, >= old chunks, bytes)` on the host, made with `fitted`.

        static: `(K,)` mask of heads. is_text: `(N,)` mask of prompt tokens. correction: of predicted queries. Copies
        pages to the device.
        """
        self.phase, self._host = phase, host
        self.pages = LayerPages(host, phase, table_width(phase.plan, phase.tiers, index, static))
        saliency, kept = rows.saliency, phase.plan.pages[index]
        whole = static & (kept == phase.plan.layout.old_chunks)
        if phase.tiers.policy.merge is not None:
            whole = torch.zeros_like(static)
        self.pages.plan_whole(whole.nonzero().flatten())
        for head in (static & ~whole).nonzero().flatten().tolist():
            self.pages.fill_static(head, int(kept[head]), saliency[head], is_text)
        self.dynamic = (~static).nonzero().flatten()
        """KV heads, on the host."""
        self.retrieval: Retrieval | None = None
        """None: no head is dynamic."""
        if len(self.dynamic):
            self.pages.plan_sinks(self.dynamic)
            self.retrieval = Retrieval(index, self.pages, self.dynamic, digests, fitted, saliency)
        self.pages.fill()
        if self.retrieval is not None:
            self._set_lengths(self.retrieval)
        self.correction: Correction | None = None
        """On the device; None also where queries are not predicted."""
        if correction is not None and self.foresees:
            self.correction = correction.to(self.pages.device, host.dtype)
            phase.ledger.reserve("tables", self.correction.nbytes)
        ranking = None if self.retrieval is None else self.retrieval.ranking
        ranked = 0 if ranking is None else ranking.digests.numel()
        self._threads = worth(ranked + self.pages.table.numel() * 2 * host.chunk_tokens * host.head_dim)
        """CPU threads that a step's operations are large enough for."""

    @property
    def length(self) -> int:
        """Logical length: prompt and generated tokens."""
        return self._host.length + self.pages.generated

    def _set_lengths(self, retrieval: Retrieval) -> None:
        """Make each head attend to the first `selected` chunks in its columns, all of them full."""
        heads, first, most = retrieval.heads, self.pages.first_selected, retrieval.most_selected
        there = torch.arange(most, device=heads.device) < retrieval.selected.unsqueeze(1)
        self.pages.lengths[heads, first : first + most] = there.int() * self._host.chunk_tokens

    # ---- several tokens

    def decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, again: bool = False
    ) -> torch.Tensor:
        """Decode tokens one after another: query and output `(H, n, D)`, keys and values `(K, n, D)`.

        again: for a reader, whose steps choose chunks by their own queries. The tokens are the last ones cached;
        query may be that of fewer, the last ones, than there are keys.
        """
        if again:
            n = query.shape[1]
            keys, values = keys[:, -n:], values[:, -n:]
            self.pages.rewind(n)
        with at_most(self._threads):
            return self._decode(query, keys, values, scaling)

    def _decode(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        n = query.shape[1]
        if n == 1:
            return self.step(query[:, 0], keys[:, 0], values[:, 0], scaling).unsqueeze(1)
        if self.retrieval is None or self.retrieval.ranking is None:
            return self._decode_at_once(query, keys, values, scaling)
        at_once = max(1, min(n, self._ranked_at_once()))
        out = []
        for begin in range(0, n, at_once):
            rows = slice(begin, min(begin + at_once, n))
            out += self._decode_ranked_at_once(query[:, rows], keys[:, rows], values[:, rows], scaling)
        return torch.stack(out, dim=1)

    def _decode_at_once(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """All steps in one pass, if no head ranks chunks: each attends to the pages and to the new tokens so far."""
        before = self.pages.attend(query, scaling)
        visible = self.pages.as_stored(keys, values)
        out, _ = exact.merge(*before, *exact.attend(query, *visible, scaling, causal=True))
        for row in range(query.shape[1]):
            self._append(keys[:, row], values[:, row])
        return out.to(query.dtype)

    def _decode_ranked_at_once(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> list[torch.Tensor]:
        """Outputs `(H, D)` of steps whose chunks are ranked in one pass over the digests."""
        n = query.shape[1]
        if n == 1:
            return [self.step(query[:, 0], keys[:, 0], values[:, 0], scaling)]
        assert self.retrieval is not None
        assert self.retrieval.ranking is not None
        phase = self.phase
        with phase.ledger.scratch("ranked ahead", n * self._row_bytes()):
            folded = query.reshape(self._host.num_heads, -1, query.shape[-1])
            with phase.ledger.scratch("ranking", ranking_bytes(phase.shape, phase.tiers, phase.plan.layout)):
                logits = self.retrieval.ranking.logits(folded, scaling)
            return [
                self.step(query[:, row], keys[:, row], values[:, row], scaling, logits.of_step(row, n))
                for row in range(n)
            ]

    def _row_bytes(self) -> int:
        """Device bytes of ranking one more step in the same pass."""
        return ranked_ahead_bytes(self.phase.shape, self.phase.plan.layout)

    def _ranked_at_once(self) -> int:
        """Steps that can be ranked in one pass, beside the scratch that a single step takes."""
        phase = self.phase
        ranking = ranking_bytes(phase.shape, phase.tiers, phase.plan.layout)
        spare = phase.ledger.free_bytes - max(ranking, self.pages.scratch_bytes)
        return min(MOST_ROWS, spare // self._row_bytes())

    # ---- one token

    def step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        logits: ChunkLogits | None = None,
    ) -> torch.Tensor:
        """Cache one token's key and value, each `(K, D)`, and attend with its query `(H, D)`: output `(H, D)`.

        logits: of its chunks, if they are known already (`Ranking.logits`).
        """
        self._append(key, value)
        if self.retrieval is not None:
            grouped = query.view(self._host.num_heads, -1, query.shape[-1])
            self.retrieval.step(grouped, scaling, logits)
        page_lse = None if self.retrieval is None else self.retrieval.page_lse
        out, lse = self.pages.attend(query.unsqueeze(1), scaling, page_lse, query.dtype)
        if self.retrieval is not None:
            self.retrieval.record_step(lse.view(self._host.num_heads, -1))
        return out.squeeze(1)

    @property
    def foresees(self) -> bool:
        """Whether chunks are copied for a query that is predicted."""
        return self.retrieval is not None and self.retrieval.foresees

    def foresee(self, query: Callable[[], torch.Tensor], scaling: float) -> None:
        """The next step's query will be about `query()`, `(H, D)`: copy in the background what it will miss. The query
        is computed there, too."""
        assert self.retrieval is not None
        self.retrieval.foresee(lambda: query().view(self._host.num_heads, -1, self._host.head_dim), scaling)

    def _append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.advance()
        self.pages.append(key, value)

    # ---- counts in Python

    def advance(self) -> None:
        """Count a generated token. Raises `BudgetError` if there is no room for it."""
        self.pages.advance()
        if self.retrieval is not None:
            self.retrieval.advance()

    def position(self) -> LayerPosition:
        """The counts that `advance` changes."""
        steps = 0 if self.retrieval is None else self.retrieval.steps
        return LayerPosition(self.pages.generated, steps)

    def go_back(self, position: LayerPosition) -> None:
        """Undo every `advance` since `position` was taken."""
        self.pages.go_back(position.generated)
        if self.retrieval is not None:
            self.retrieval.go_back(position.steps)
