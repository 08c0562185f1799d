"""One layer during decoding: its pages in the pool, and the step that selects, fetches and attends.

Every head attends to pages: its recent region and the generated tokens; then, for a static head, the tokens kept by
pruning; for a dynamic head, the sink chunks and the chunks selected in this step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tieredkv.attention import exact
from tieredkv.cache.decode_phase import DecodePhase
from tieredkv.cache.prefill import TextRows
from tieredkv.cache.retrieval import Retrieval
from tieredkv.environment.threads import at_most, worth
from tieredkv.errors import BudgetError
from tieredkv.memory.host import HostLayer
from tieredkv.memory.units import FLOAT32
from tieredkv.ops import torch_ops
from tieredkv.ops.packing import Packing, channel_norms, rounded, unpack
from tieredkv.planning.decode_plan import gather_bytes, table_width
from tieredkv.planning.sizes import chunk_bytes, ranking_bytes
from tieredkv.policy import prune
from tieredkv.policy.digests.sketch import Basis

MOST_ROWS = 32
"""Steps whose chunks are ranked in one pass."""


@dataclass(frozen=True, slots=True)
class LayerPosition:
    """How far a layer has decoded, as far as it is counted in Python."""

    recent_tokens: int
    generated: int
    steps: int
    """Of the retrieval, since its counters were flushed."""


class SealedLayer:
    """Pages and tables of one layer; alive from `seal` until the cache takes prompt tokens again or closes."""

    def __init__(
        self,
        index: int,
        host: HostLayer,
        digests: torch.Tensor,
        basis: Basis | None,
        static: torch.Tensor,
        rows: TextRows,
        is_text: torch.Tensor,
        phase: DecodePhase,
    ) -> None:
        """host: all prompt tokens. digests: `(K, >= old chunks, bytes)` on the host. static: `(K,)` mask.

        is_text: `(N,)`, which prompt tokens are text. Copies pages to the device; counts them as warm.
        """
        self.host, self.phase = host, phase
        self.device = phase.pool.pages.device
        layout, plan = phase.plan.layout, phase.plan
        heads, self._c = host.num_heads, host.chunk_tokens
        self.generated = 0

        self.static = static.nonzero().squeeze(1)
        self.dynamic = (~static).nonzero().squeeze(1)
        self._rows = self.dynamic.to(self.device)
        sinks, recent = layout.sink_chunks, layout.recent_pages
        width = table_width(plan, phase.tiers, index, static)
        self.table = phase.ledger.empty("tables", (heads, width), torch.int32, self.device).zero_()
        self.lengths = phase.ledger.empty("tables", (heads, width), torch.int32, self.device).zero_()

        self.packing: Packing | None = None
        if phase.pool.scales is not None:
            shape = heads, 2, host.head_dim
            self.packing = Packing(phase.pool.scales, phase.ledger.empty("tables", shape, torch.float32, self.device))
            self.packing.norms.copy_(channel_norms(host.chunks(), host.length))
        self._fill_recent(recent, layout.recent_start)
        for head in self.static.tolist():
            pages = int(plan.pages[index, head])
            self._fill_static(head, pages, recent, rows.saliency[head, : layout.recent_start], is_text)
        self.retrieval: Retrieval | None = None
        if len(self.dynamic):
            self._fill_sinks(sinks, recent)
            first = recent + sinks
            saliency = rows.saliency
            self.retrieval = Retrieval(
                index, host, self.dynamic, digests, basis, saliency, self.table, first, phase, self.packing
            )
            self._picked = slice(first, first + self.retrieval.most_selected)
            self._place = torch.arange(self.retrieval.most_selected, device=self.device)
            self._set_lengths(self.retrieval)
        ranked = 0 if self.retrieval is None or self.retrieval.digests is None else self.retrieval.digests.numel()
        self._threads = worth(ranked + self.table.numel() * 2 * self._c * host.head_dim)
        """That a step's operations are large enough for, on a CPU."""

    @property
    def length(self) -> int:
        """Logical length: prompt and generated tokens."""
        return self.host.length + self.generated

    # ---- seal

    def _fetch(self, heads: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor) -> None:
        """Copy whole chunks `ids` (absolute) of `heads` into pool `slots`, all `(m,)`."""
        phase = self.phase
        phase.ops.fetch(self.host.arena, phase.pool.pages, heads, ids, slots, self.packing)
        phase.counters.warm_bytes += len(ids) * chunk_bytes(phase.shape, phase.tiers)

    def _fill_recent(self, pages: int, first_token: int) -> None:
        heads, c = self.host.num_heads, self._c
        self.table[:, :pages] = self.phase.pool.take(heads * pages).view(heads, pages)
        self.recent_tokens = self.host.length - first_token
        self._recent_length = torch.full((1,), self.recent_tokens, dtype=torch.int32, device=self.device)
        filled = -(-self.recent_tokens // c)
        ids = (first_token // c + torch.arange(filled, device="cpu")).repeat(heads)
        who = torch.arange(heads, device="cpu").repeat_interleave(filled)
        self._fetch(who, ids, self.table[:, :filled].flatten())
        if within := self.recent_tokens % c:  # what the host holds behind its last token was never written
            last = self.table[:, filled - 1]
            self.phase.pool.pages[last, :, within:] = 0
            if self.packing is not None:
                self.packing.scales[last, :, within:] = 0
        starts = torch.arange(pages, device=self.device) * c
        self.lengths[:, :pages] = (self.recent_tokens - starts).clamp(0, c)

    def _fill_static(self, head: int, pages: int, column: int, saliency: torch.Tensor, is_text: torch.Tensor) -> None:
        if pages == 0:
            return
        config, c, pool = self.phase.tiers, self._c, self.phase.pool
        method, n = config.policy, saliency.shape[0]

        def read() -> tuple[torch.Tensor, torch.Tensor]:
            return self.host.tokens(head, torch.arange(n, device="cpu"))

        tokens = prune.HeadTokens(saliency, is_text[:n], config.sink_tokens, method.saliency_pool, read)
        kept, slots = prune.kept_tokens(method.rank(tokens), pages * c), pool.take(pages)
        self.table[head, column : column + pages] = slots
        filled = kept.numel() - c * torch.arange(pages, device=self.device)
        self.lengths[head, column : column + pages] = filled.clamp(0, c).int()
        if method.merge is None:
            self.phase.ops.keep(self.host.arena, pool.pages, head, kept, slots, self.packing)
        else:
            merged = torch.stack(method.merge(tokens, kept), dim=1)
            torch_ops.write(merged, pool.pages, head, slots, self.packing)
        self.phase.counters.warm_bytes += kept.numel() * chunk_bytes(self.phase.shape, config) // c

    def _fill_sinks(self, sinks: int, column: int) -> None:
        n = len(self.dynamic)
        slots = self.phase.pool.take(n * sinks).view(n, sinks)
        self.table[self.dynamic, column : column + sinks] = slots.int()
        self.lengths[self.dynamic, column : column + sinks] = self._c
        who = self.dynamic.repeat_interleave(sinks)
        self._fetch(who, torch.arange(sinks, device="cpu").repeat(n), slots.flatten())

    def _set_lengths(self, retrieval: Retrieval) -> None:
        """Of the chunks selected, which are always full, as many as each head attends to."""
        full = torch.where(self._place < retrieval.selected.unsqueeze(1), self._c, 0)
        self.lengths[self._rows, self._picked] = full.to(self.lengths.dtype)

    # ---- decode

    def steps(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        """Tokens one after another: query and output `(H, n, D)`, keys and values `(K, n, D)`."""
        with at_most(self._threads):
            return self._steps(query, keys, values, scaling)

    def _steps(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        n = query.shape[1]
        if n == 1:
            return self.step(query[:, 0], keys[:, 0], values[:, 0], scaling).unsqueeze(1)
        if self.retrieval is None or self.retrieval.digests is None:
            return self._steps_together(query, keys, values, scaling)
        at_once = max(1, min(n, self._rows_at_once()))
        out = []
        for begin in range(0, n, at_once):
            rows = slice(begin, min(begin + at_once, n))
            out += self._steps_ranked_together(query[:, rows], keys[:, rows], values[:, rows], scaling)
        return torch.stack(out, dim=1)

    def _steps_together(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """The same in one pass, where no head chooses: each row sees the pages that were there, and its forerunners."""
        held = self._attend(query, scaling)
        seen = keys, values
        if self.packing is not None:
            norms = self.packing.norms
            seen = rounded(keys, norms[:, 0]), rounded(values, norms[:, 1])
        out, _ = exact.merge(*held, *exact.attend(query, *seen, scaling, causal=True))
        for row in range(query.shape[1]):
            self._append(keys[:, row], values[:, row])
        return out.to(query.dtype)

    def _steps_ranked_together(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> list[torch.Tensor]:
        """Outputs `(H, D)` of as many steps as can be ranked in one pass over the digests."""
        n = query.shape[1]
        if n == 1:
            return [self.step(query[:, 0], keys[:, 0], values[:, 0], scaling)]
        assert self.retrieval is not None
        phase = self.phase
        with phase.ledger.scratch("ranked ahead", n * self._row_bytes()):
            folded = query.reshape(self.host.num_heads, -1, query.shape[-1])
            with phase.ledger.scratch("ranking", ranking_bytes(phase.shape, phase.tiers, phase.plan.layout)):
                ahead = self.retrieval.logits(folded, scaling).unflatten(1, (-1, n))
            return [
                self.step(query[:, row], keys[:, row], values[:, row], scaling, ahead[:, :, row]) for row in range(n)
            ]

    def _row_bytes(self) -> int:
        """Of one more step ranked ahead: logits of all tokens, and three times logits of all chunks."""
        shape, layout = self.phase.shape, self.phase.plan.layout
        return FLOAT32 * shape.num_attention_heads * layout.retrievable * (layout.chunk_tokens + 3)

    def _rows_at_once(self) -> int:
        """Steps that can be ranked ahead beside the scratch that each of them takes."""
        phase = self.phase
        ranking = ranking_bytes(phase.shape, phase.tiers, phase.plan.layout)
        spare = phase.ledger.free_bytes - max(ranking, self._scratch_bytes())
        return min(MOST_ROWS, spare // self._row_bytes())

    def _scratch_bytes(self) -> int:
        return gather_bytes(self.phase.shape, self.phase.tiers, self.phase.plan, self.table.numel())

    def step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Take one token's key and value, each `(K, D)`, and attend with its query `(H, D)`: output `(H, D)`.

        logits: its chunks', if they are known already (`Retrieval.logits`).
        """
        phase = self.phase
        self._append(key, value)
        if self.retrieval is not None:
            grouped = query.view(self.host.num_heads, -1, query.shape[-1])
            if phase.tiers.adaptive and self.retrieval.adapt():
                self._set_lengths(self.retrieval)
            self.retrieval.step(grouped, scaling, logits)
        out, lse = self._attend(query.unsqueeze(1), scaling)
        if self.retrieval is not None:
            self.retrieval.record_step(grouped, scaling, lse.view(self.host.num_heads, -1))
        return out.squeeze(1).to(query.dtype)

    def _attend(self, query: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Of queries `(H, n, D)` to everything in the table: output and lse, float32."""
        phase = self.phase
        with phase.ledger.scratch("scratch", self._scratch_bytes()):
            return phase.ops.paged_attention(
                query, phase.pool.pages, self.table, self.lengths, scaling, phase.plan.scratch_pages, self.packing
            )

    def _append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.advance()
        phase = self.phase
        phase.ops.append(key, value, phase.pool.pages, self.table, self.lengths, self._recent_length, self.packing)
        self._recent_length += 1

    def advance(self) -> None:
        """Count a generated token. Raises `BudgetError` if there is no room for it."""
        if self.recent_tokens // self._c >= self.phase.plan.layout.recent_pages:
            raise BudgetError(
                f"the device has room for {self.generated} generated tokens and no more: ask for a larger "
                "max_new_tokens before generating, so that it is reserved."
            )
        self.recent_tokens += 1
        self.generated += 1
        if self.retrieval is not None:
            self.retrieval.steps += 1

    def position(self) -> LayerPosition:
        """What `advance` changes."""
        steps = 0 if self.retrieval is None else self.retrieval.steps
        return LayerPosition(self.recent_tokens, self.generated, steps)

    def go_back(self, position: LayerPosition) -> None:
        """Undo every `advance` since `position` was taken."""
        self.recent_tokens, self.generated = position.recent_tokens, position.generated
        if self.retrieval is not None:
            self.retrieval.steps = position.steps

    # ---- end

    def generated_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each `(K, generated, D)` on the host, of the tokens decoded since the seal.

        Copied page by page, so that no second copy of them is ever on the device; of packed pages as precise as those.
        """
        shape = (2, self.host.num_heads, self.generated, self.host.head_dim)
        tokens = torch.empty(shape, dtype=self.host.dtype, device="cpu")
        first = self.recent_tokens - self.generated
        for head in range(self.host.num_heads):
            for page in range(first // self._c, -(-self.recent_tokens // self._c)):
                start, stop = max(first, page * self._c), min(self.recent_tokens, (page + 1) * self._c)
                slot = int(self.table[head, page])
                held = self.phase.pool.pages[slot]
                if self.packing is not None:
                    held = unpack(held, self.packing.scales[slot], self.packing.norms[head].unsqueeze(1))
                tokens[:, head, start - first : stop - first] = held[:, start - page * self._c : stop - page * self._c]
        return tokens[0], tokens[1]
