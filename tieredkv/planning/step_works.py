"""What each layer does in a decoding step under a plan, for `step_time`."""

from __future__ import annotations

import torch

from tieredkv.config import TierConfig
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning import sizes
from tieredkv.planning.decode_plan import DecodePlan, missed_bytes
from tieredkv.planning.step_time import LAUNCHES, MODEL_LAUNCHES, MissLimit, Rates, Work, weights_only_ms


def model_layers(shape: KVShape) -> int:
    """All layers of the decoder, tiered or not."""
    return shape.num_layers + shape.readers + shape.sliding_layers + shape.linear_layers + shape.convolutions


def miss_limit(shape: KVShape, tiers: TierConfig, weight_bytes: int, rates: Rates) -> MissLimit | None:
    """What `step_overhead` allows a step to spend on misses; None: as much as it takes.

    weight_bytes: what a step reads of the weights.
    """
    if tiers.step_overhead is None or tiers.budget_ratio is not None:
        return None
    return MissLimit(tiers.step_overhead * weights_only_ms(weight_bytes, model_layers(shape), rates), rates)


def step_works(
    shape: KVShape,
    tiers: TierConfig,
    plan: DecodePlan,
    static: torch.Tensor,
    host_bits: int,
    weight_bytes: int,
    untiered_bytes: int = 0,
    launches: dict[str, float] | None = None,
) -> list[Work]:
    """The work of each tiered layer, then that of all others. static: `(L, K)`.

    weight_bytes: what a step reads of the weights, here spread evenly. untiered_bytes: what it reads of the layers that
    do not grow. launches: in place of `LAUNCHES`.
    """
    counts, layout, heads = launches or LAUNCHES, plan.layout, shape.num_key_value_heads
    every, page = model_layers(shape), sizes.page_bytes(shape, tiers, plan.page_bits)
    missed = missed_bytes(shape, tiers, layout, plan.selected, plan.slots, host_bits)
    works = []
    for index, mask in enumerate(static):
        dynamic = int((~mask).sum())
        ranked, times = plan.ranked and dynamic > 0, 1 + (shape.readers if index == shape.num_layers - 1 else 0)
        pages = heads * layout.recent_pages + int((plan.pages[index] * mask).sum())
        pages += dynamic * layout.sink_chunks + int(plan.selected[index].sum())
        works.append(
            Work(
                weight_bytes=weight_bytes / every,
                model_launches=MODEL_LAUNCHES,
                launches=times * counts["ranked" if ranked else "unranked"],
                page_bytes=times * pages * page,
                digest_bytes=times * sizes.digest_bytes(shape, tiers, layout, dynamic) if ranked else 0,
                chunks=times * layout.retrievable,
                slots=times * int(plan.slots[index].max()),
                missed_bytes=missed[index] if ranked else 0.0,
            )
        )
    others = every - shape.num_layers
    if others:
        works.append(Work(others * weight_bytes / every, others * MODEL_LAUNCHES, page_bytes=untiered_bytes))
    return works
