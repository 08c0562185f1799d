"""The reflection and rotation of 4 bits: of the few vectors that a step attends with or writes, not of cached ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tieredkv.codecs.base import Fit
from tieredkv.ops.triton.variants import launch

WIDTH = 32
"""Rows of the rotation, or columns, that a program reads at a time."""


@triton.jit
def turned(row, centre, mirror, turn, column, stored, D: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr):
    """Entries `column` `(PADDED,)` of a vector that is reflected, then rotated, float32; 0 where not `stored`.

    row, centre, mirror: pointers to D numbers. The vector is `row - centre`; centre may be None. turn: a pointer to
    `(D, D)` float32.
    """
    total, shadow = tl.zeros([PADDED], tl.float32), tl.zeros([PADDED], tl.float32)
    along = tl.zeros([WIDTH], tl.float32)
    for first in range(0, D, WIDTH):
        d = first + tl.arange(0, WIDTH)
        numbers = tl.load(row + d, mask=d < D, other=0.0).to(tl.float32)
        if centre is not None:
            numbers -= tl.load(centre + d, mask=d < D, other=0.0)
        across = tl.load(mirror + d, mask=d < D, other=0.0)
        inside = (d[:, None] < D) & stored[None, :]
        tile = tl.load(turn + d[:, None] * D + column[None, :], mask=inside, other=0.0)
        total += tl.sum(numbers[:, None] * tile, 0)
        shadow += tl.sum(across[:, None] * tile, 0)
        along += numbers * across
    return total - 2 * tl.sum(along, 0) * shadow


@triton.jit(do_not_specialize=["group"])
def _turn_queries(
    query, centre, mirrors, turn, out, constant, scaling, group,
    D: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0), tl.arange(0, PADDED)
    keys = row // group * (2 * D)
    numbers = tl.load(query + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    common = tl.load(centre + keys + d, mask=d < D, other=0.0)
    tl.store(constant + row, tl.sum(numbers * common, 0) * scaling)
    after = turned(query + row * D, None, mirrors + keys, turn, d, d < D, D, PADDED, WIDTH)
    tl.store(out + row * D + d, after * scaling, mask=d < D)


def turn_queries(
    query: torch.Tensor, fit: Fit, turn: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `turned` and `constant` of `codecs.rotated`, both scaled: queries `(H, n, D)` in their dtype, and `(H, n)`
    float32. turn: its Hadamard matrix."""
    heads, n, d = query.shape
    out, constant = torch.empty_like(query), torch.empty((heads, n), dtype=torch.float32, device=query.device)
    launch(
        _turn_queries, (heads * n,),
        query, fit.centre, fit.channels, turn, out, constant, scaling, heads // len(fit.centre) * n,
        D=d, PADDED=triton.next_power_of_2(d), WIDTH=WIDTH,
    )  # fmt: skip
    return out, constant
