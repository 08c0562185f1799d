"""How the cap is spent on one prompt while decoding: pages, chunks and slots of every head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from tieredkv.config import TierConfig
from tieredkv.errors import BudgetError
from tieredkv.memory.units import ceil_div, largest
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning.admission import refusal
from tieredkv.planning.ahead_time import SHARES, USUAL, Lead, Waits, copying
from tieredkv.planning.misses import choosing_works, total_wait, works_by_selected
from tieredkv.planning.sizes import (
    Layout,
    all_pages,
    beside_pool_bytes,
    correction_bytes,
    gathered_pages,
    least_pages,
    old_pages,
    page_bits,
    page_bytes,
    pool_bytes,
    scratch_page_bytes,
)
from tieredkv.policy.budget import by_need, split_budget

Bound = Literal["nothing", "budget_ratio", "memory", "link", "floor"]
"""Nothing: a step attends to everything. Memory: as much as fits. Link: as much as may be copied. Floor: the least that
is attended to where it fits, though copies take longer than they may."""
FLOOR_RATIO = 0.05
"""However slow the link, a step attends to as much as under this `budget_ratio`, if that fits: the smallest whose loss
of quality is measured (docs/benchmarks.md, "What policies lose")."""
NO_FEWER = 0.98
"""Of the chunks that a step attends to without copies ahead, the least that it attends to with them where they are
chosen to save time: what corrects predicted queries takes the place of some."""
WhyAhead = Literal[
    "asked",
    "more",
    "shorter",
    "declined",
    "unranked",
    "prefetch",
    "reuse",
    "unknown",
    "unpredicted",
    "disk",
    "room",
    "longer",
]
"""Why chunks are copied ahead: `ahead=True`; a step may then attend to more; it is predicted to be shorter. Why not:
`ahead=False`; chunks are not ranked; `prefetch=False`; heads may reuse the choice of the step before (`reuse_above`);
there is no card whose rates are known; no query is predicted; chunks are on disk; corrections do not fit under the cap;
a step is not predicted to be better."""


def copies_ahead(why: WhyAhead) -> bool:
    """Whether this is a reason for copies ahead, not against them."""
    return why in ("asked", "more", "shorter")


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
    why_ahead: WhyAhead
    ahead_bytes: int = 0
    """What predicting queries keeps on the device, at most."""
    ahead_per_cent: int = USUAL
    """Of the chunks that a step selects, how many likely ones are copied ahead, if any are."""

    @property
    def ahead(self) -> bool:
        """Whether queries are predicted and chunks copied ahead for them."""
        return copies_ahead(self.why_ahead)

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
    waits: Waits | None = None,
) -> DecodePlan:
    """Spend `cap_bytes` on one prompt. scores, static: `(L, K)`; heads of dense layers are static and keep everything.

    need: `(2, L, K)`, need and spread of each head where the policy measured them (`policy.budget.by_need`).
    host_bits: of the host tier. waits: how long a step may wait for misses, as predicted; more than fits is not
    selected then, and slots stay as many; None: no limit, and nothing is known of its time. Raises `BudgetError`,
    naming the smallest cap that works.

    Whether chunks are copied ahead is decided here, unless `ahead` says so: if a step may then attend to more chunks,
    or to about as many (`NO_FEWER`) in less time. So is how many: as many as make the step best.
    """
    given = shape, tiers, layout, cap_bytes, scores, static, need, host_bits, waits
    without = _plan(*given, leads=(), why_ahead=_why_not(tiers, waits))
    if not without.ranked:
        return replace(without, why_ahead="unranked")
    leads = () if waits is None else waits.leads
    if without.why_ahead in ("declined", "prefetch", "reuse", "unpredicted"):
        return without
    if tiers.ahead is None and without.why_ahead in ("unknown", "disk"):
        return without

    def way(per_cent: int) -> DecodePlan:
        found = _plan(*given, leads=copying(leads, per_cent), why_ahead="asked")
        return replace(found, ahead_per_cent=per_cent)

    try:
        usual = way(USUAL)
    except BudgetError:
        return replace(without, why_ahead="room")
    if waits is None:
        return usual
    rates, limit_ms = waits.rates, waits.limit_ms

    def wait(plan: DecodePlan, leads: Sequence[Lead | None]) -> float:
        works = choosing_works(shape, tiers, layout, static, plan.selected, plan.slots, host_bits, leads)
        return total_wait(works, rates).total

    def merit(plan: DecodePlan) -> tuple[int, float]:
        """How many chunks a step attends to, and how little it waits."""
        return int(plan.selected.sum()), -wait(plan, copying(leads, plan.ahead_per_cent) if plan.ahead else ())

    # If the usual plan's chunks would keep a step too long with another number of copies, it attends to fewer with it.
    others = [per_cent for per_cent in SHARES if per_cent != USUAL] if any(leads) else []
    if usual.bound == "link":
        others = [per_cent for per_cent in others if wait(usual, copying(leads, per_cent)) <= limit_ms]
    ahead = max((usual, *map(way, others)), key=merit)
    if tiers.ahead:
        return ahead
    (chunks, saved), (least, no_more) = merit(ahead), merit(without)
    if chunks > least:
        return replace(ahead, why_ahead="more")
    return replace(ahead, why_ahead="shorter") if chunks >= NO_FEWER * least and saved > no_more else without


def _why_not(tiers: TierConfig, waits: Waits | None) -> WhyAhead:
    """Why chunks are not copied ahead, where they are ranked."""
    if tiers.ahead is False:
        return "declined"
    if not tiers.prefetch:
        return "prefetch"
    if tiers.policy.reuse_above <= 1:
        return "reuse"
    if waits is None or not waits.leads:
        return "unknown"
    if not any(waits.leads):
        return "unpredicted"
    return "disk" if waits.on_disk else "longer"


def _plan(
    shape: KVShape,
    tiers: TierConfig,
    layout: Layout,
    cap_bytes: int,
    scores: torch.Tensor,
    static: torch.Tensor,
    need: torch.Tensor | None,
    host_bits: int,
    waits: Waits | None,
    leads: tuple[Lead | None, ...],
    why_ahead: WhyAhead,
) -> DecodePlan:
    """`plan_decode`, with leads if chunks are copied ahead in them."""
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
            pages = torch.full_like(every, most)
            return DecodePlan(layout, pages, every, every, False, scratch, bits, "nothing", "unranked")

    predicted = sum(lead is not None for lead in leads) if leads else shape.num_layers
    ahead_bytes = predicted * correction_bytes(shape) if copies_ahead(why_ahead) else 0
    left = cap_bytes - beside_pool_bytes(shape, tiers, layout, n_dynamic) - ahead_bytes
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
        if waits is not None and waits.limit_ms < math.inf:
            floor = pages_of(old_pages(replace(tiers, budget_ratio=FLOOR_RATIO), layout)) - layout.sink_chunks

            works = works_by_selected(shape, tiers, layout, static, slots, host_bits, leads)

            def wait(selected: torch.Tensor) -> float:
                return total_wait(works(selected), waits.rates).total

            selected, bound = _within(waits.limit_ms, wait, selected, floor)
    else:  # the ratio fixes how many are selected; spare slots come on top
        selected = room
        more = (affordable - int(pages[dense:].sum())) // n_dynamic if n_dynamic else 0
        wanted = (selected.float() / (1 - tiers.spare_ratio)).long()
        slots = torch.minimum(wanted, selected + more).clamp(max=layout.retrievable)
        pages = torch.where(static, pages, layout.sink_chunks + slots)
    ranked = bool((selected[~static] < layout.retrievable).any())
    used = n_heads * layout.recent_pages + int(pages.sum())
    scratch = scratch_for(pool, used, left)
    return DecodePlan(layout, pages, selected, slots, ranked, scratch, bits, bound, why_ahead, ahead_bytes)


def _within(
    limit_ms: float, wait: Callable[[torch.Tensor], float], selected: torch.Tensor, floor: torch.Tensor
) -> tuple[torch.Tensor, Bound]:
    """The largest share of `selected` `(L, K)`, the same of every head, with which the predicted wait, in ms, is within
    the limit, but no less than `floor` of any head; and what bound it."""
    steps = 4096

    def part(step: int) -> torch.Tensor:
        return torch.minimum(selected, torch.maximum(floor, selected * step // steps))

    longest = wait(selected)
    if longest <= limit_ms or torch.equal(part(0), selected):
        return selected, "memory"
    least = wait(part(0))
    if least > limit_ms:
        return part(0), "floor"
    return part(last_within(lambda step: wait(part(step)), limit_ms, (0, least), (steps, longest))), "link"


def last_within(
    value: Callable[[int], float], limit: float, inside: tuple[int, float], outside: tuple[int, float]
) -> int:
    """The largest whole number whose `value`, which never falls, is within `limit`. inside, outside: a number of which
    it is, a larger one of which it is not, and their values.

    By interpolation, as waits are nearly linear in what is selected. A try that leaves more than half of the interval
    is followed by one that halves it, so at worst there are twice as many as in a bisection.
    """
    (low, least), (high, most) = inside, outside
    halve = False
    while (width := high - low) > 1:
        step = width // 2 if halve else int(width * (limit - least) / (most - least))
        middle = low + min(max(step, 1), width - 1)
        if (found := value(middle)) <= limit:
            low, least = middle, found
        else:
            high, most = middle, found
        halve = 2 * (high - low) > width
    return low


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
