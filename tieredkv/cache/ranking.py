"""Which chunks look best to a query: by their digests, or because the previous step chose them.

Shapes: `n` dynamic heads, `N` chunks, `K` KV heads, `G` query heads per KV head, `D` head dim.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from tieredkv.cache.decode_phase import DecodePhase
from tieredkv.memory.ledger import DeviceLedger
from tieredkv.planning import sizes
from tieredkv.policy import select
from tieredkv.policy.digests import Fitted


@dataclass(frozen=True, slots=True)
class ChunkLogits:
    """What digests say of all chunks, for `rows` queries of each dynamic head: those of one step or of several."""

    each: torch.Tensor
    """`(n, rows, N)`: estimated logits, up to a constant for each row."""
    parts: torch.Tensor | None
    """`(n, rows, any)`: of `Digest.logits_in_parts`."""
    constant: torch.Tensor | None
    """`(n, rows)`: that constant; None: digests do not estimate mass."""

    def of_step(self, step: int, steps: int) -> ChunkLogits:
        """Those of one of `steps` steps, which take turns in the rows."""
        parts, constant = self.parts, self.constant
        return ChunkLogits(
            self.each[:, step::steps].contiguous(),
            None if parts is None else parts[:, step::steps].contiguous(),
            None if constant is None else constant[:, step::steps].contiguous(),
        )


class Ranking:
    """Ranks the chunks of one layer's dynamic heads by their digests, which it keeps on the device."""

    def __init__(self, digests: torch.Tensor, fitted: Fitted, heads: torch.Tensor, phase: DecodePhase) -> None:
        """digests: uint8 `(K, >= old chunks, bytes)` on the host, made with `fitted`. heads: `(n,)` KV heads, on the
        host."""
        tiers, shape, layout, ops, ledger = phase.tiers, phase.shape, phase.plan.layout, phase.ops, phase.ledger
        first, chunks, device = layout.sink_chunks, layout.retrievable, phase.pool.records.device
        self.digest = ops.digest(sizes.digest_for(shape, tiers))
        self.digests = ledger.empty("digests", (len(heads), chunks, digests.shape[2]), digests.dtype, device)
        """`(n, N, bytes)` on the device."""
        for own, head in zip(self.digests, heads.tolist(), strict=True):
            new = self.digest.arranged(digests[head : head + 1, first : first + chunks])
            own.copy_(new[0], non_blocking=True)
        self._fitted = fitted.for_ranking(heads).to(device)
        ledger.reserve("digests", self._fitted.nbytes)
        self._at_once = sizes.ranked_chunks_at_once(shape, tiers, layout)
        self._scratch_bytes = sizes.ranking_bytes(shape, tiers, layout, self._at_once)
        self.ops = ops
        self._heads, self._policy, self._ledger = heads.to(device, non_blocking=True), tiers.policy, ledger

    def scratch(self) -> AbstractContextManager[None]:
        """Counts the scratch of ranking while the block runs."""
        return self._ledger.scratch("ranking", self._scratch_bytes)

    def logits(self, query: torch.Tensor, scaling: float) -> ChunkLogits:
        """Logits of all chunks, for queries `(K, rows, D)` of one or more steps."""
        prepared, constant = self.digest.project(query, self._heads, scaling, self._fitted)
        each, parts = self.digest.logits_in_parts(prepared, self.digests, self._at_once)
        return ChunkLogits(each, parts, constant)

    def ranks(self, logits: ChunkLogits, chosen: torch.Tensor) -> torch.Tensor:
        """Ranks `(n, N)` by the logits of one step. chosen `(n, N)`: chunks that the previous step attended to."""
        policy = self._policy
        return self.ops.chunk_ranks(logits.each, chosen, policy.chunk_group, policy.stay, logits.parts)


class Reuse:
    """Lets a head reuse the previous step's chunks if its query has hardly changed (FreeKV)."""

    def __init__(self, above: float, shape: tuple[int, int, int], ledger: DeviceLedger, device: torch.device) -> None:
        """above: cosine from which a query counts as unchanged. shape: `(n, G, D)`."""
        self._above = above
        # NaN is not similar to any query, so the first step reuses nothing.
        self._query = ledger.empty("tables", shape, torch.float32, device).fill_(float("nan"))

    def ranks(
        self, ranks: torch.Tensor, query: torch.Tensor, chosen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ranks `(n, N)` by which heads choose, and the mask `(n,)` of heads that reuse.

        query `(n, G, D)` float32: this step's, remembered for the next. chosen `(n, N)`: the previous step's.
        """
        alike = select.query_similarity(query, self._query) >= self._above
        self._query.copy_(query)
        return torch.where(alike.unsqueeze(1), chosen.float(), ranks), alike
