"""What each layer misses in a step and copies from the host, by the assumed hit rate, and how long the step waits.

Shapes: `L` tiered layers, `K` KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    chunk, last, works = chunk_bytes(shape, tiers, host_bits), shape.num_layers - 1, []
    for index, (some, resident) in enumerate(zip(selected.tolist(), slots.tolist(), strict=True)):
        dynamic = int((~static[index]).sum())
        if not dynamic:
            works.append(Work())
            continue
        times = 1 + (shape.readers if index == last else 0)
        hits = [assumed_hit_rate(count, layout.retrievable) for count in resident]
        missed = chunk * sum(count * (1 - rate) for count, rate in zip(some, hits, strict=True))
        works.append(
            Work(
                digest_bytes=times * digest_bytes(shape, tiers, layout, dynamic),
                chunks=times * layout.retrievable,
                slots=times * max(resident),
                missed_bytes=times * missed,
                spare=1 - sum(some) / sum(resident) if sum(resident) else 0.0,
                lead=leads[index] if leads else None,
            )
        )
    return works


def total_wait(works: Sequence[Work], rates: Rates) -> Wait:
    """Of a step."""
    return sum((waiting(work, rates) for work in works), Wait())
