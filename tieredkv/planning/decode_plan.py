"""How the cap is spent on one prompt while decoding: pages, chunks and slots of every head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from tieredkv.config import TierConfig
from tieredkv.memory.units import ceil_div, largest
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning.admission import refusal
from tieredkv.planning.sizes import (
    Layout,
    all_pages,
    beside_pool_bytes,
    chunk_bytes,
    gathered_pages,
    least_pages,
    old_pages,
    page_bits,
    page_bytes,
    pool_bytes,
    scratch_page_bytes,
)
from tieredkv.planning.step_time import MissLimit, assumed_hit_rate, miss_ms
from tieredkv.policy.budget import by_need, split_budget

Bound = Literal["nothing", "budget_ratio", "memory", "link", "floor"]
"""Nothing: a step attends to everything. Memory: as much as fits. Link: as much as may be copied. Floor: the least that
is attended to where it fits, though copies take longer than they may."""
FLOOR_RATIO = 0.05
"""However slow the link, a step attends to as much as under this `budget_ratio`, if that fits: the smallest whose loss
of quality is measured (docs/benchmarks.md, "What policies lose")."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Sizes of the decode phase. The tensors are `(L, K)` int64."""

    layout: Layout
    pages: torch.Tensor
    """Pages before the recent region: a static head's kept tokens, a dynamic head's sinks and slots."""
    selected: torch.Tensor
    """Chunks a dynamic head attends to per step besides sinks and recent region; 0 for static heads."""
    slots: torch.Tensor
    """Retrieval slots of a dynamic head: selected and spare ones; 0 for static heads."""
    ranked: bool
    """Whether chunks must be ranked; False if every dynamic head attends to all of them."""
    scratch_pages: int
    """Pages that the torch attention gathers at a time."""
    page_bits: int
    """Of the codec of pages."""
    bound: Bound
    """What keeps a step from attending to more."""

    def pool_pages(self, layers: list[int]) -> int:
        """Pages of these layers, recent regions included."""
        heads = self.pages.shape[1]
        return len(layers) * heads * self.layout.recent_pages + int(self.pages[layers].sum())


def plan_decode(
    shape: KVShape,
    tiers: TierConfig,
    layout: Layout,
    cap_bytes: int,
    scores: torch.Tensor,
    static: torch.Tensor,
    need: torch.Tensor | None = None,
    *,
    host_bits: int,
    limit: MissLimit | None = None,
) -> DecodePlan:
    """Spend `cap_bytes` on one prompt. scores, static: `(L, K)`; heads of dense layers are static and keep everything.

    need: `(2, L, K)`, need and spread of each head where the policy measured them (`policy.budget.by_need`).
    host_bits: of the host tier. limit: without a `budget_ratio`, what a step may spend on misses, as predicted; more
    than fits is not selected then, and slots stay as many; None: no limit. Raises `BudgetError`, naming the smallest
    cap that works.
    """
    policy, dense = tiers.policy, tiers.policy.dense_layers
    if not bool(static[:dense].all()):
        raise ValueError("heads of dense layers must be static")
    n_heads, n_dense, n_dynamic = shape.kv_heads, static[:dense].numel(), int((~static).sum())
    most, allowed = layout.old_chunks, old_pages(tiers, layout)
    everything = all_pages(shape, layout)

    def pages_for(nbytes: int) -> int:
        """Pool pages that fit in `nbytes` together with the scratch to attend to them."""
        return largest(lambda pages: pool_bytes(shape, tiers, pages, bits) <= nbytes, max(0, nbytes // page))

    def scratch_for(pool: int, used: int, nbytes: int) -> int:
        """Scratch pages for a pool of `pool` pages. If only `used` of them are needed, the rest of `nbytes` goes to
        scratch, up to a layer's pages, so that attention takes fewer, larger steps."""
        least = gathered_pages(shape, tiers, ceil_div(pool, shape.kv_heads))
        left = (nbytes - used * page) // scratch_page_bytes(shape, tiers, bits)
        return min(max(least, gathered_pages(shape, tiers, ceil_div(used, shape.num_layers))), max(least, left))

    left = cap_bytes - beside_pool_bytes(shape, tiers, layout, 0)
    # The most bits are tried first. If not everything fits, `bits` and `page` stay those tried last.
    for bits in page_bits(tiers, host_bits):
        page = page_bytes(shape, tiers, bits)
        pool = pages_for(left)
        if pool >= everything and allowed >= most:
            every = torch.where(static, 0, layout.retrievable)
            scratch = scratch_for(pool, everything, left)
            return DecodePlan(layout, torch.full_like(every, most), every, every, False, scratch, bits, "nothing")

    left = cap_bytes - beside_pool_bytes(shape, tiers, layout, n_dynamic)
    pool = pages_for(left)
    affordable = pool - n_heads * layout.recent_pages - n_dense * most
    least, rest = least_pages(layout), static[dense:]

    def pages_of(allowed: int) -> torch.Tensor:
        """Pages of each head if an average one may have so many. Raises ValueError if they cannot serve all heads."""
        total = min(affordable, (n_heads - n_dense) * allowed)
        if need is not None:
            c, floor = layout.chunk_tokens, policy.dynamic_floor
            budgets = by_need(need[0, dense:], need[1, dense:], rest, total, most, least, c, floor)
        else:
            split, floor, weight = policy.type_split, policy.static_floor, policy.static_weight
            budgets = split_budget(scores[dense:], rest, total, most, least, split, floor, weight)
        return torch.cat((torch.full_like(static[:dense], most, dtype=torch.int64), budgets))

    try:
        if policy.keep_all:
            raise ValueError("everything does not fit")
        pages = pages_of(allowed)
    except ValueError:
        raise refusal(shape, tiers, layout, bits=host_bits) from None

    bound: Bound = "memory" if allowed >= most or affordable < (n_heads - n_dense) * allowed else "budget_ratio"
    room = torch.where(static, 0, pages - layout.sink_chunks)
    if tiers.budget_ratio is None:  # the whole room becomes slots, some of them spare
        slots = room
        spare = torch.minimum((slots - 1).clamp(min=0), (slots.float() * tiers.spare_ratio).long())
        selected = torch.where(slots == layout.retrievable, slots, slots - spare)
        if limit is not None:
            floor = pages_of(old_pages(replace(tiers, budget_ratio=FLOOR_RATIO), layout)) - layout.sink_chunks
            selected, bound = _within(limit, shape, tiers, layout, selected, slots, floor, host_bits)
    else:  # the ratio fixes how many are selected; spare slots come on top
        selected = room
        more = (affordable - int(pages[dense:].sum())) // n_dynamic if n_dynamic else 0
        wanted = (selected.float() / (1 - tiers.spare_ratio)).long()
        slots = torch.minimum(wanted, selected + more).clamp(max=layout.retrievable)
        pages = torch.where(static, pages, layout.sink_chunks + slots)
    ranked = bool((selected[~static] < layout.retrievable).any())
    used = n_heads * layout.recent_pages + int(pages.sum())
    return DecodePlan(layout, pages, selected, slots, ranked, scratch_for(pool, used, left), bits, bound)


def _within(
    limit: MissLimit,
    shape: KVShape,
    tiers: TierConfig,
    layout: Layout,
    selected: torch.Tensor,
    slots: torch.Tensor,
    floor: torch.Tensor,
    host_bits: int,
) -> tuple[torch.Tensor, Bound]:
    """The largest share of `selected` `(L, K)`, the same of every head, with which the predicted time of misses is
    within the limit, but no less than `floor` of any head; and what bound it."""
    steps = 4096

    def part(step: int) -> torch.Tensor:
        return torch.minimum(selected, torch.maximum(floor, selected * step // steps))

    def fits(step: int) -> bool:
        missed = missed_bytes(shape, tiers, layout, part(step), slots, host_bits)
        return sum(miss_ms(nbytes, limit.rates) for nbytes in missed) <= limit.ms

    if fits(steps) or torch.equal(part(0), selected):
        return selected, "memory"
    most = largest(fits, steps)
    return part(most), "link" if fits(most) else "floor"


def missed_bytes(
    shape: KVShape, tiers: TierConfig, layout: Layout, selected: torch.Tensor, slots: torch.Tensor, host_bits: int
) -> list[float]:
    """What each layer copies in a step, by the assumed hit rate. selected, slots: `(L, K)`. The last layer chooses once
    more for each of its readers."""
    chunk, missed = chunk_bytes(shape, tiers, host_bits), []
    for some, resident in zip(selected.tolist(), slots.tolist(), strict=True):
        rates = [assumed_hit_rate(count, layout.retrievable) for count in resident]
        missed.append(chunk * sum(count * (1 - rate) for count, rate in zip(some, rates, strict=True)))
    missed[-1] *= 1 + shape.readers
    return missed


def table_width(plan: DecodePlan, tiers: TierConfig, index: int, static: torch.Tensor) -> int:
    """Columns of the page table of layer `index`: the most pages one of its heads may attend to. static: `(K,)`."""
    chosen = (plan.slots if tiers.adaptive else plan.selected)[index]
    attended = torch.where(static, plan.pages[index], plan.layout.sink_chunks + chosen)
    return plan.layout.recent_pages + int(attended.max())


def gather_bytes(shape: KVShape, tiers: TierConfig, plan: DecodePlan, table_pages: int) -> int:
    """Scratch of attending to a layer whose page table lists `table_pages` pages."""
    return min(plan.scratch_pages, table_pages) * scratch_page_bytes(shape, tiers, plan.page_bits)


def mean_old_tokens(shape: KVShape, tiers: TierConfig, layout: Layout, cap_bytes: int, host_bits: int) -> int:
    """Tokens before the recent region that an average head could keep if all heads were static."""
    scores = torch.ones((shape.num_layers, shape.num_key_value_heads), dtype=torch.float32, device="cpu")
    plan = plan_decode(shape, tiers, layout, cap_bytes, scores, scores.bool(), host_bits=host_bits)
    pages = plan.pages[tiers.policy.dense_layers :]
    return int(pages.double().mean()) * layout.chunk_tokens if pages.numel() else layout.recent_start
