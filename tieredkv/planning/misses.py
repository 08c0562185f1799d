"""What each layer misses in a step and copies from the host, by the assumed hit rate, and how long the step waits.

Shapes: `L` tiered layers, `K` KV heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import mul
from typing import Any

import torch

from tieredkv.config import TierConfig
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning.ahead_time import Lead, Wait
from tieredkv.planning.rates import Rates
from tieredkv.planning.sizes import Layout, chunk_bytes, digest_bytes
from tieredkv.planning.step_time import Work, assumed_hit_rate, waiting


def choosing_works(
    shape: KVShape,
    tiers: TierConfig,
    layout: Layout,
    static: torch.Tensor,
    selected: torch.Tensor,
    slots: torch.Tensor,
    host_bits: int,
    leads: Sequence[Lead | None] = (),
) -> list[Work]:
    """For each layer its work of choosing chunks and fetching those that are missing; no work where all heads are
    static. static, selected, slots: `(L, K)`. leads: of each layer; empty: nothing is copied ahead.

    The last layer chooses once more for each of its readers.
    """
    return works_by_selected(shape, tiers, layout, static, slots, host_bits, leads)(selected)


def works_by_selected(
    shape: KVShape,
    tiers: TierConfig,
    layout: Layout,
    static: torch.Tensor,
    slots: torch.Tensor,
    host_bits: int,
    leads: Sequence[Lead | None] = (),
) -> Callable[[torch.Tensor], list[Work]]:
    """`choosing_works` as a function of `selected`: a search tries many, and the rest is computed once."""
    chunk, last, chunks = chunk_bytes(shape, tiers, host_bits), shape.num_layers - 1, layout.retrievable
    layers: list[tuple[dict[str, Any], list[float], int] | None] = []
    dynamic = (~static).sum(1).tolist()
    digests = {heads: digest_bytes(shape, tiers, layout, heads) for heads in set(dynamic)}
    for index, (heads, resident) in enumerate(zip(dynamic, slots.tolist(), strict=True)):
        if not heads:
            layers.append(None)
            continue
        times = 1 + (shape.readers if index == last else 0)
        fixed = {
            "digest_bytes": times * digests[heads],
            "chunks": times * chunks,
            "slots": times * max(resident),
            "lead": leads[index] if leads else None,
        }
        missing = [times * chunk * (1 - assumed_hit_rate(count, chunks)) for count in resident]
        layers.append((fixed, missing, sum(resident)))

    def works(selected: torch.Tensor) -> list[Work]:
        found = []
        for layer, counts in zip(layers, selected.tolist(), strict=True):
            if layer is None:
                found.append(Work())
                continue
            fixed, missing, resident = layer
            missed = sum(map(mul, counts, missing))
            spare = 1 - sum(counts) / resident if resident else 0.0
            found.append(Work(missed_bytes=missed, spare=spare, **fixed))
        return found

    return works


def total_wait(works: Sequence[Work], rates: Rates) -> Wait:
    """Of a step."""
    return sum((waiting(work, rates) for work in works), Wait())
