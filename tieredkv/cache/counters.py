"""Counters: what the decoding steps since the last seal did."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Selection:
    """Chunks that one layer's dynamic heads attended to in one step; recorded for a trace only."""

    step: int
    """From 1. A layer that others read takes a step for itself and one for each of them."""
    layer: int
    heads: torch.Tensor
    """`(n,)` KV heads."""
    first_token: torch.Tensor
    """`(n, m)` index of each selected chunk's first token in the prompt; -1 beyond what a head selects."""
    query: torch.Tensor
    """`(K, G, D)`: the layer's query in this step."""


@dataclass(slots=True)
class Counters:
    """Counts of one decode phase."""

    selected: int = 0
    """Chunks that dynamic heads attended to, over all steps, layers and heads."""
    resident: int = 0
    """Those of them that were already in the pool, copied ahead or not."""
    reused: int = 0
    """Chunks selected because the previous step selected them."""
    unseen_sum: float = 0.0
    """Estimated share of attention mass that was not seen, summed over steps, layers and dynamic heads."""
    unseen_count: int = 0
    """Number of terms in `unseen_sum`."""
    missed_bytes: int = 0
    """Bytes copied to the device because a step needed them."""
    prefetched_bytes: int = 0
    """Bytes copied ahead: for a predicted query, or for a step that may reuse them."""
    warm_bytes: int = 0
    """Bytes copied to the device by the seal: pages to fill the pool, and digests."""
    static_heads: int = 0
    dynamic_heads: int = 0
    trace: list[Selection] | None = None

    @property
    def hit_rate(self) -> float | None:
        """Share of selected chunks that were resident; None when nothing was selected."""
        return self.resident / self.selected if self.selected else None

    @property
    def unseen_mass(self) -> float | None:
        """Mean estimated share of attention mass that steps did not see; None where digests do not estimate it."""
        return self.unseen_sum / self.unseen_count if self.unseen_count else None
