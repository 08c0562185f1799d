"""How the cap is spent on one prompt while decoding: pages, chunks and slots of every head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tieredkv.config import TierConfig
from tieredkv.memory.units import ceil_div
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning.sizes import (
    Layout,
    digest_bytes,
    least_pages,
    page_bytes,
    ranking_bytes,
    refusal,
    scratch_page_bytes,
    table_bytes,
)
from tieredkv.policy.budget import by_need, split_budget


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Sizes of the decode phase. The tensors are `(L, K)` int64."""

    layout: Layout
    pages: torch.Tensor
    """Pages before the recent region: of a static head its kept tokens, of a dynamic one its sinks and its slots."""
    selected: torch.Tensor
    """Chunks a dynamic head attends to per step besides sinks and recent region; 0 for static heads."""
    slots: torch.Tensor
    """Retrieval slots of a dynamic head: selected and spare ones; 0 for static heads."""
    ranked: bool
    """Whether chunks must be ranked at all: not when every dynamic head attends to all of them."""
    pool_pages: int
    scratch_pages: int
    """Pages the torch attention gathers at a time."""
    packed: bool
    """Whether pages are of 8 bits."""


def plan_decode(
    shape: KVShape,
    tiers: TierConfig,
    layout: Layout,
    scores: torch.Tensor,
    static: torch.Tensor,
    need: torch.Tensor | None = None,
) -> DecodePlan:
    """Spend the cap on one prompt. scores, static: `(L, K)`; heads of dense layers are static, and keep everything.

    need: `(2, L, K)`, need and spread of each head where the policy measured them (`policy.budget.by_need`). Raises
    `BudgetError`, naming the least cap that works.
    """
    n_heads = shape.kv_heads
    most = layout.old_chunks
    everything = n_heads * (most + layout.recent_pages)
    dense = tiers.policy.dense_layers
    if not bool(static[:dense].all()):
        raise ValueError("heads of dense layers must be static")
    n_dense = static[:dense].numel()
    n_dynamic = int((~static).sum())

    def pages_for(nbytes: int) -> tuple[int, int]:
        """Pool pages and scratch pages that `nbytes` hold: scratch for an average head's pages, at least one a head."""
        pool = max(0, (nbytes - scratch_page) // page)
        while pool > 0:
            scratch = max(shape.num_key_value_heads, ceil_div(pool, n_heads))
            if pool * page + scratch * scratch_page <= nbytes:
                return pool, scratch
            pool -= max(1, (pool * page + scratch * scratch_page - nbytes) // (page + scratch_page))
        return 0, 0

    def wider(scratch: int, used: int, nbytes: int) -> int:
        """More scratch, up to a layer's pages, where `used` pool pages leave room in `nbytes`: fewer, larger steps."""
        return min(max(scratch, ceil_div(used, shape.num_layers)), max(scratch, (nbytes - used * page) // scratch_page))

    cap = tiers.cap_bytes - table_bytes(shape, tiers, layout)
    ratio, old_pages = tiers.budget_ratio, most
    if ratio is not None and not tiers.policy.keep_all:
        recent = layout.tokens - layout.recent_start
        old_pages = max(least_pages(layout), int((ratio * layout.tokens - recent) // layout.chunk_tokens))
    # As made if all of it fits; the kind tried last is what the rest is counted in.
    for packed in (False, True) if tiers.pack_pages and not tiers.policy.keep_all else (False,):
        page, scratch_page = _page(shape, tiers, packed)
        pool, scratch = pages_for(cap)
        if pool >= everything and old_pages >= most:
            every = torch.where(static, 0, layout.retrievable)
            pages = torch.full_like(every, most)
            return DecodePlan(layout, pages, every, every, False, everything, wider(scratch, everything, cap), packed)

    ranking = ranking_bytes(shape, tiers, layout) if n_dynamic else 0
    cap -= digest_bytes(shape, tiers, layout, n_dynamic) + ranking
    pool, scratch = pages_for(cap)
    affordable = pool - n_heads * layout.recent_pages - n_dense * most
    least, total = least_pages(layout), affordable
    if ratio is not None:
        total = min(affordable, (n_heads - n_dense) * old_pages)
    rest, method = static[dense:], tiers.policy
    try:
        if method.keep_all:
            raise ValueError("everything does not fit")
        if need is not None:
            c, floor = layout.chunk_tokens, method.dynamic_floor
            budgets = by_need(need[0, dense:], need[1, dense:], rest, total, most, least, c, floor)
        else:
            budgets = split_budget(
                scores[dense:], rest, total, most, least, method.type_split, method.static_floor, method.static_weight
            )
    except ValueError:
        raise refusal(shape, tiers, layout) from None
    pages = torch.cat((torch.full_like(static[:dense], most, dtype=torch.int64), budgets))

    room = torch.where(static, 0, pages - layout.sink_chunks)
    if ratio is None:  # all of it is slots, some of them spare
        slots = room
        spare = torch.minimum((slots - 1).clamp(min=0), (slots.float() * tiers.spare_ratio).long())
        selected = torch.where(slots == layout.retrievable, slots, slots - spare)
    else:  # as many are selected as the ratio says, and the spare ones come on top
        selected = room
        left = (affordable - int(budgets.sum())) // n_dynamic if n_dynamic else 0
        wanted = (selected.float() / (1 - tiers.spare_ratio)).long()
        slots = torch.minimum(wanted, selected + left).clamp(max=layout.retrievable)
        pages = torch.where(static, pages, layout.sink_chunks + slots)
    ranked = bool((selected[~static] < layout.retrievable).any())
    used = n_heads * layout.recent_pages + int(pages.sum())
    return DecodePlan(layout, pages, selected, slots, ranked, used, wider(scratch, used, cap), packed)


def _page(shape: KVShape, tiers: TierConfig, packed: bool) -> tuple[int, int]:
    return page_bytes(shape, tiers, packed), scratch_page_bytes(shape, tiers, packed)


def table_width(made: DecodePlan, tiers: TierConfig, index: int, static: torch.Tensor) -> int:
    """Columns of the page table of layer `index`: the most pages one of its heads may attend to. static: `(K,)`."""
    chosen = (made.slots if tiers.adaptive else made.selected)[index]
    attended = torch.where(static, made.pages[index], made.layout.sink_chunks + chosen)
    return made.layout.recent_pages + int(attended.max())


def mean_old_tokens(shape: KVShape, tiers: TierConfig, layout: Layout) -> int:
    """Tokens before the recent region that an average head can keep, were all heads static."""
    scores = torch.ones((shape.num_layers, shape.num_key_value_heads), dtype=torch.float32, device="cpu")
    made = plan_decode(shape, tiers, layout, scores, scores.bool())
    dense = tiers.policy.dense_layers
    pages = made.pages[dense:]
    return int(pages.double().mean()) * layout.chunk_tokens if pages.numel() else layout.recent_start
