"""Ranks that follow a script: hit rates, and what predictions of queries foresee, are set and not found.

Keys, values and weights of benchmarks are random, so their ranking says nothing about how many of the chosen chunks
would be in the pool, nor about how many of the others a prediction would find. Everything is done as usual, including
the real ranking, whose result is then not used. Shapes: `n` dynamic heads, `N` chunks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial

import torch

from tieredkv import TieredCache
from tieredkv.environment.ambient import settled
from tieredkv.memory.copies import BackgroundCopies, StreamCopies, ThreadCopies
from tieredkv.ops.base import Ops
from tieredkv.planning.ahead_time import ahead_share, foreseen_share


@dataclass(frozen=True, slots=True, eq=False)
class Script:
    """The chunks of each of a layer's heads in a circle, and a window in it, which is chosen and advances every step.

    The distance of a chunk is its place less that of the window's first one, modulo N.
    """

    order: torch.Tensor
    """`(n, N)` int64: the place of each chunk in its head's circle."""
    shift: torch.Tensor
    """`(n, 1)` int64: how far the window advances in a step, which is how many chunks it will miss."""
    place: torch.Tensor
    """`(n, 1)` int64: where it begins."""
    predicted: torch.Tensor
    """`(n, N)` float32: by distance, the rank that a prediction gives."""

    def ranks(self) -> torch.Tensor:
        """Of a step, `(n, N)`; it begins with this."""
        self.place.add_(self.shift)
        return -torch.remainder(self.order - self.place, self.order.shape[1])

    def predicted_ranks(self) -> torch.Tensor:
        """Of a prediction of the next step, `(n, N)`."""
        return self.predicted.gather(1, torch.remainder(self.order - self.place - self.shift, self.order.shape[1]))


def ranks_by_distance(chunks: int, selected: int, shift: int, foreseen: float, wasted: float) -> torch.Tensor:
    """Ranks `(N,)` of one head that a prediction gives to chunks by their distance in the next step.

    Best are those that the step before selected, too; then `foreseen * shift` of the `shift` that are missing; then
    `wasted * shift` from far away, other ones at every step; then the rest, first what was selected last, as that is
    still there; and at the end the other missing ones.
    """
    kept, far = selected - shift, (selected + chunks) // 2
    late, vain = kept + round(foreseen * shift), min(chunks, far + round(wasted * shift))
    every = torch.arange(chunks, dtype=torch.int64, device="cpu")
    parts = every[:late], every[far:vain], every[vain:].flip(0), every[selected:far].flip(0), every[late:selected]
    ranks = torch.empty(chunks, dtype=torch.float32, device="cpu")
    ranks[torch.cat(parts)] = -every.float()
    return ranks


def shares(missed: float, copied_ahead: float, without: float | None) -> dict[str, float | None]:
    """Chunks copied ahead and selected (foreseen), and others copied ahead (wasted), relative to `without`, the bytes
    missed without copies ahead. missed, copied_ahead: bytes with them. The first layer counts and is not predicted."""
    if not without:
        return {"foreseen": None, "wasted": None}
    found = without - missed
    return {"foreseen": found / without, "wasted": (copied_ahead - found) / without}


class Drift:
    """Operations, and copies, of caches whose ranks follow a script.

    Each head advances through its chunks in a random order, at a rate such that a given share of the chosen chunks was
    chosen at the step before. What is ranked in the background is a prediction. On a card the script adds a few small
    launches to each ranking, on the stream of the ranking.
    """

    def __init__(self, ops: Ops) -> None:
        self._real = ops
        self._scripts: dict[int, Script] = {}
        self._background = threading.local()
        self.predicted: set[Hashable] = set()
        """Layers that were ranked in the background since `begin`."""
        self.assumed: dict[str, float] = {}
        """What the script says of predictions."""
        self.ops = replace(ops, chunk_ranks=self._ranks)

    def copies(self, device: torch.device) -> BackgroundCopies:
        """For one cache whose layers are on `device`."""
        return _Marked(StreamCopies() if device.type == "cuda" else ThreadCopies(), self._in_background)

    @settled  # steps write to the script outside inference mode
    def begin(
        self, cache: TieredCache, hit_rate: float | None, foreseen: float | None = None, wasted: float | None = None
    ) -> None:
        """Write the script for a cache that was sealed with these operations. hit_rate: None: ranks are the real ones.

        foreseen, wasted: of a predicted layer, relative to the chunks that it would miss without copies ahead: those
        that it need not fetch itself, and others that are copied; the latter as far as so many are taken at all. None:
        as the planner assumes (`planning.ahead_time`).
        """
        self._scripts.clear()
        self.predicted.clear()
        for layer in cache.tiered_layers if hit_rate is not None else ():
            assert layer.sealed is not None
            retrieval, phase = layer.sealed.retrieval, layer.sealed.phase
            if retrieval is not None:
                per_cent = phase.plan.ahead_per_cent
                usual = foreseen_share(phase.tiers.spare_ratio, per_cent)
                found = usual if foreseen is None else foreseen
                vain = ahead_share(per_cent) - usual if wasted is None else wasted
                self.assumed = {"assumed_foreseen": found, "assumed_wasted": vain, "ahead_per_cent": per_cent}
                chosen = retrieval.residency.chosen
                chunks, device = chosen.shape[1], chosen.device
                shift = ((1 - hit_rate) * retrieval.selected).round().long().unsqueeze(1)
                counts = zip(retrieval.selected.tolist(), shift.flatten().tolist(), strict=True)
                by_distance = [ranks_by_distance(chunks, *own, found, vain) for own in counts]
                order = torch.rand(chosen.shape, device=device).argsort(dim=1)
                predicted = torch.stack(by_distance).to(device)
                self._scripts[chosen.data_ptr()] = Script(order, shift, torch.zeros_like(shift), predicted)

    def _in_background(self, key: Hashable, copy: Callable[[], int]) -> int:
        self._background.key = key
        try:
            return copy()
        finally:
            self._background.key = None

    def _ranks(
        self, logits: torch.Tensor, chosen: torch.Tensor, group: str, stay: float, parts: torch.Tensor | None = None
    ) -> torch.Tensor:
        ranks = self._real.chunk_ranks(logits, chosen, group, stay, parts)
        key = getattr(self._background, "key", None)
        if key is not None:
            self.predicted.add(key)
        if not self._scripts:
            return ranks
        script = self._scripts[chosen.data_ptr()]
        return ranks.copy_(script.ranks() if key is None else script.predicted_ranks())


class _Marked:
    """Copies that run through `run`, with their key."""

    def __init__(self, real: BackgroundCopies, run: Callable[[Hashable, Callable[[], int]], int]) -> None:
        self._real, self._run = real, run

    def submit(self, key: Hashable, copy: Callable[[], int]) -> None:
        self._real.submit(key, partial(self._run, key, copy))

    def wait(self, key: Hashable) -> int:
        return self._real.wait(key)

    def drain(self) -> None:
        self._real.drain()

    def close(self) -> None:
        self._real.close()
