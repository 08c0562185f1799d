"""What each layer does in a decoding step under a plan, for `step_time`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from tieredkv.config import TierConfig
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning import sizes
from tieredkv.planning.ahead_time import Lead, Waits, copying
from tieredkv.planning.decode_plan import DecodePlan
from tieredkv.planning.misses import choosing_works
from tieredkv.planning.rates import Rates
from tieredkv.planning.step_time import LAUNCHES, MODEL_LAUNCHES, Work, weights_only_ms


def model_layers(shape: KVShape) -> int:
    """All layers of the decoder, tiered or not."""
    return shape.num_layers + shape.readers + shape.sliding_layers + shape.linear_layers + shape.convolutions


def step_waits(
    shape: KVShape,
    tiers: TierConfig,
    weight_bytes: int,
    rates: Rates,
    leads: Sequence[Lead | None] = (),
    on_disk: bool = False,
) -> Waits:
    """What steps may spend on chunks that are not on the device: what `step_overhead` allows, without a `budget_ratio`.

    weight_bytes: what a step reads of the weights. leads: of each tiered layer; empty on a CPU. on_disk: whether
    chunks are.
    """
    limit = math.inf
    if tiers.step_overhead is not None and tiers.budget_ratio is None:
        limit = tiers.step_overhead * weights_only_ms(weight_bytes, model_layers(shape), rates)
    return Waits(limit, rates, tuple(leads), on_disk)


def step_works(
    shape: KVShape,
    tiers: TierConfig,
    plan: DecodePlan,
    static: torch.Tensor,
    host_bits: int,
    weight_bytes: int,
    untiered_bytes: int = 0,
    launches: dict[str, float] | None = None,
    leads: Sequence[Lead | None] = (),
) -> list[Work]:
    """The work of each tiered layer, then that of all others. static: `(L, K)`.

    weight_bytes: what a step reads of the weights, here spread evenly. untiered_bytes: what it reads of the layers that
    do not grow. launches: in place of `LAUNCHES`. leads: of each tiered layer, if the plan copies ahead.
    """
    counts, layout, heads = launches or LAUNCHES, plan.layout, shape.num_key_value_heads
    every, page = model_layers(shape), sizes.page_bytes(shape, tiers, plan.page_bits)
    ahead = copying(leads, plan.ahead_per_cent) if plan.ahead else ()
    choosing = choosing_works(shape, tiers, layout, static, plan.selected, plan.slots, host_bits, ahead)
    works = []
    for index, (mask, work) in enumerate(zip(static, choosing, strict=True)):
        dynamic = int((~mask).sum())
        ranked, times = plan.ranked and dynamic > 0, 1 + (shape.readers if index == shape.num_layers - 1 else 0)
        pages = heads * layout.recent_pages + int((plan.pages[index] * mask).sum())
        pages += dynamic * layout.sink_chunks + int(plan.selected[index].sum())
        works.append(
            replace(
                work if ranked else Work(),
                weight_bytes=weight_bytes / every,
                model_launches=MODEL_LAUNCHES,
                launches=times * counts["ranked" if ranked else "unranked"],
                page_bytes=times * pages * page,
            )
        )
    others = every - shape.num_layers
    if others:
        works.append(Work(others * weight_bytes / every, others * MODEL_LAUNCHES, page_bytes=untiered_bytes))
    return works
