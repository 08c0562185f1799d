"""Stage 2: top-down budgets, head type first, then head (HybridKV). The equations are ours; the paper's are unknown.

Everything is counted in pages of C tokens, the unit the pool deals in. The recent window and the generated tokens
are outside: every head has those anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Budgets:
    """Pages per head beyond the recent window."""

    static_pages: torch.Tensor
    """`(L, K)` int64: pages of kept tokens of each static head, 0 for dynamic heads."""
    dynamic_pages: int
    """Pages of every dynamic head: sink chunks and retrieved chunks together."""


WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "need": lambda scores: (1.0 - scores).clamp(min=0) + 1e-6,
    "score": lambda scores: scores.clamp(min=0) + 1e-6,
    "even": torch.ones_like,
}
"""Weights by which static heads share their budget, from their scores S. The paper gives no sign: a head whose rows are
less concentrated may need more ("need"), or a head that is known to concentrate may deserve more ("score")."""


def split_budget(
    scores: torch.Tensor,
    static: torch.Tensor,
    total_pages: int,
    most_pages: int,
    least_dynamic: int,
    type_split: float,
    static_floor: float,
    static_weight: str = "need",
) -> Budgets:
    """Divide `total_pages` among the heads of a model.

    scores, static: `(L, K)`, S and the static mask. most_pages: pages that hold everything; no head gets more.
    least_dynamic: pages a dynamic head cannot do without. With `n_s` static and `n_d` dynamic heads,
    B_dyn = type_split * B * n_d / (n_s + n_d), shared evenly; the static heads share the rest by `static_weight`, each
    getting at least `static_floor` of their mean.
    Never spends more than `total_pages` unless the minimum (least_dynamic per dynamic head, 1 per static one)
    already does, which raises ValueError.
    """
    n_static, n_dynamic = int(static.sum()), int((~static).sum())
    least = n_dynamic * min(least_dynamic, most_pages) + n_static * min(1, most_pages)
    if total_pages < least:
        raise ValueError(f"{total_pages} pages cannot serve {n_static} static and {n_dynamic} dynamic heads ({least})")

    dynamic_pages = 0
    if n_dynamic:
        share = type_split if n_static else 1.0
        dynamic_pages = int(share * total_pages / (n_static + n_dynamic))
        affordable = (total_pages - n_static * min(1, most_pages)) // n_dynamic
        dynamic_pages = min(max(dynamic_pages, least_dynamic), affordable, most_pages)
    left = total_pages - n_dynamic * dynamic_pages

    static_pages = torch.zeros(scores.shape, dtype=torch.int64)
    if n_static:
        weights = WEIGHTS[static_weight](scores[static].double())
        static_pages[static] = _share_out(weights, left, most_pages, static_floor)
        if n_dynamic:  # what capped static heads could not use goes back to the dynamic ones
            unused = left - int(static_pages.sum())
            dynamic_pages = min(most_pages, dynamic_pages + unused // n_dynamic)
    return Budgets(static_pages, dynamic_pages)


def by_need(
    need_pages: torch.Tensor, static: torch.Tensor, total_pages: int, most_pages: int, least_dynamic: int
) -> Budgets:
    """Divide `total_pages` by what static heads need, `(L, K)`; what they leave is shared evenly by the dynamic ones.

    Static heads get at least a page each, and what is left when every dynamic head has all it could use, each in
    proportion to what it lacks. ValueError as `split_budget`.
    """
    n_static, n_dynamic = int(static.sum()), int((~static).sum())
    given = torch.where(static, need_pages.clamp(min(1, most_pages), most_pages), 0)
    reserved = n_dynamic * min(least_dynamic, most_pages)
    if int(given.sum()) + reserved > total_pages:  # needs are met in proportion
        if n_static * min(1, most_pages) + reserved > total_pages:
            raise ValueError(f"{total_pages} pages cannot serve {n_static} static and {n_dynamic} dynamic heads")
        given[static] = _share_out(given[static].double(), total_pages - reserved, most_pages, 0.0)
    left = total_pages - int(given.sum())
    dynamic_pages = min(most_pages, left // n_dynamic) if n_dynamic else 0
    left -= n_dynamic * dynamic_pages
    if dynamic_pages == (most_pages if n_dynamic else 0):
        lacking = torch.where(static, most_pages - given, 0)
        given += lacking * min(left, int(lacking.sum())) // max(1, int(lacking.sum()))
    return Budgets(given, dynamic_pages)


def _share_out(weights: torch.Tensor, pages: int, most: int, floor: float) -> torch.Tensor:
    """Integers `(n,)` that sum to at most `pages`: proportional to weights above a common floor, each in [1, most]."""
    n = weights.numel()
    if most == 0:
        return torch.zeros(n, dtype=torch.int64)
    if pages >= n * most:
        return torch.full((n,), most, dtype=torch.int64)
    base = max(1, min(most, int(floor * pages / n)))
    given = torch.full((n,), float(base), dtype=torch.float64)
    left = float(pages - n * base)
    open_ = given < most
    while left > 1e-9 and bool(open_.any()):
        part = torch.where(open_, weights, 0.0)
        grown = (given + left * part / part.sum()).clamp(max=float(most))
        left -= float((grown - given).sum())
        given = grown
        open_ = given < most
    whole = given.floor().long()
    remainder = (given - whole).masked_fill(whole >= most, -1.0)
    extra = min(int(pages - whole.sum()), int((remainder > 0).sum()))
    if extra > 0:
        whole[remainder.topk(extra).indices] += 1
    return whole
