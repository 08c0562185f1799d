"""Rotation of single vectors: of the few that a step attends with, writes or returns, never of cached ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WIDTH = 32
"""Rows of the rotation, or columns, that a program reads at a time."""


@triton.jit
def turned(row, centre, turn, column, stored, D: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr):
    """Entries `column` `(PADDED,)` of `(row - centre) @ turn`, float32, where `stored`; 0 elsewhere.

    row, centre: pointers to D numbers; centre may be None. turn: a pointer to `(D, D)` float32.
    """
    total = tl.zeros([PADDED], tl.float32)
    for first in range(0, D, WIDTH):
        d = first + tl.arange(0, WIDTH)
        numbers = tl.load(row + d, mask=d < D, other=0.0).to(tl.float32)
        if centre is not None:
            numbers -= tl.load(centre + d, mask=d < D, other=0.0)
        inside = (d[:, None] < D) & stored[None, :]
        total += tl.sum(numbers[:, None] * tl.load(turn + d[:, None] * D + column[None, :], mask=inside, other=0.0), 0)
    return total


@triton.jit
def _turn_queries(
    query, centre, turn, out, constant, scaling, group, D: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row, d = tl.program_id(0), tl.arange(0, PADDED)
    numbers = tl.load(query + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    common = tl.load(centre + row // group * (2 * D) + d, mask=d < D, other=0.0)
    tl.store(constant + row, tl.sum(numbers * common, 0) * scaling)
    after = turned(query + row * D, None, turn, d, d < D, D, PADDED, WIDTH)
    tl.store(out + row * D + d, after * scaling, mask=d < D)


def turn_queries(
    query: torch.Tensor, centre: torch.Tensor, turn: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries `(H, n, D)` rotated, in their dtype, and their products `(H, n)` float32 with the mean key; both scaled.

    centre `(K, 2, D)`, turn `(D, D)`: of `codecs.rotated`.
    """
    heads, n, d = query.shape
    out, constant = torch.empty_like(query), torch.empty((heads, n), dtype=torch.float32, device=query.device)
    _turn_queries[(heads * n,)](
        query, centre, turn, out, constant, scaling, heads // len(centre) * n,
        D=d, PADDED=triton.next_power_of_2(d), WIDTH=WIDTH,
    )  # fmt: skip
    return out, constant
