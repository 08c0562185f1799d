"""Stage 2: top-down budgets, head type first, then head (HybridKV). The equations are ours; the paper's are unknown.

Budgets are counted in pages of C tokens, the unit of the pool. The recent window and the generated tokens are left out,
as every head holds them. A budget is `(L, K)` int64: for a static head the pages of its kept tokens, for a dynamic head
those of its sink chunks and of the chunks it retrieves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "need": lambda scores: (1.0 - scores).clamp(min=0) + 1e-6,
    "score": lambda scores: scores.clamp(min=0) + 1e-6,
    "even": torch.ones_like,
}
"""Weights by which static heads share their budget, from their scores S. The paper does not give the direction: a head
whose rows are less concentrated may need more ("need"), or a head that concentrates may deserve more ("score")."""


def split_budget(
    scores: torch.Tensor,
    static: torch.Tensor,
    total_pages: int,
    most_pages: int,
    least_dynamic: int,
    type_split: float,
    static_floor: float,
    static_weight: str = "need",
) -> torch.Tensor:
    """Divide `total_pages` among the heads of a model.

    scores, static: `(L, K)`, S and the static mask. most_pages: pages that hold everything; no head gets more.
    least_dynamic: the fewest pages of a dynamic head. With `n_s` static and `n_d` dynamic heads,
    B_dyn = type_split * B * n_d / (n_s + n_d), shared evenly; the static heads share the rest by `static_weight`, each
    getting at least `static_floor` of their mean.
    Never spends more than `total_pages`. Raises ValueError when that is less than the minimum: least_dynamic per
    dynamic head, 1 per static one.
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

    pages = torch.zeros(scores.shape, dtype=torch.int64, device="cpu")
    if n_static:
        pages[static] = _share_out(WEIGHTS[static_weight](scores[static].double()), left, most_pages, static_floor)
        if n_dynamic:  # what capped static heads could not use goes back to the dynamic ones
            unused = left - int(pages.sum())
            dynamic_pages = min(most_pages, dynamic_pages + unused // n_dynamic)
    pages[~static] = dynamic_pages
    return pages


def by_need(
    need: torch.Tensor,
    spread: torch.Tensor,
    static: torch.Tensor,
    total_pages: int,
    most_pages: int,
    least_dynamic: int,
    chunk_tokens: int,
    dynamic_floor: float,
) -> torch.Tensor:
    """Divide `total_pages` by how many tokens each head needs (`classify.tokens_to_cover`; ours).

    need, spread: `(L, K)`, number of tokens that cover the share of attention that static heads must keep, and number
    that cover a smaller share. Static heads get what they need, at least a page. Of the rest, every dynamic head gets
    `dynamic_floor` of an even share; the remainder is divided in proportion to the root of spread, as a head whose
    attention is spread over more tokens misses more with the same budget. What no dynamic head can use goes to static
    heads, in proportion to what each lacks. Raises ValueError as `split_budget` does.
    """
    n_static, n_dynamic = int(static.sum()), int((~static).sum())
    pages = torch.zeros(need.shape, dtype=torch.int64, device="cpu")
    pages[static] = ((need[static] + chunk_tokens - 1) // chunk_tokens).clamp(min(1, most_pages), most_pages)
    least = min(least_dynamic, most_pages)
    if int(pages.sum()) + n_dynamic * least > total_pages:  # needs are met in proportion
        if n_static * min(1, most_pages) + n_dynamic * least > total_pages:
            raise ValueError(f"{total_pages} pages cannot serve {n_static} static and {n_dynamic} dynamic heads")
        pages[static] = _share_out(pages[static].double(), total_pages - n_dynamic * least, most_pages, 0.0)
    if n_dynamic:
        weights = spread[~static].double().clamp(min=1).sqrt()
        pages[~static] = _share_out(weights, total_pages - int(pages.sum()), most_pages, dynamic_floor, least)
    left = total_pages - int(pages.sum())
    if n_static and bool((pages[~static] == most_pages).all()):
        lacking = torch.where(static, most_pages - pages, 0)
        pages += lacking * min(left, int(lacking.sum())) // max(1, int(lacking.sum()))
    return pages


def _share_out(weights: torch.Tensor, pages: int, most: int, floor: float, least: int = 1) -> torch.Tensor:
    """Integers `(n,)` that sum to at most `pages`: proportional to weights above a common floor, each in [least, most].

    `pages` must hold `least` for each.
    """
    n = weights.numel()
    if most == 0:
        return torch.zeros(n, dtype=torch.int64, device="cpu")
    if pages >= n * most:
        return torch.full((n,), most, dtype=torch.int64, device="cpu")
    base = max(least, min(most, int(floor * pages / n)))
    given = torch.full((n,), float(base), dtype=torch.float64, device="cpu")
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
