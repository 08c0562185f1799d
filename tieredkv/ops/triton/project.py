"""Queries as digests take them: of dynamic heads only, scaled, along the directions of their keys.

Shapes: `K` KV heads, `n` dynamic heads, `D` head dim, `m` directions, `r` numbers that a query is converted to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tieredkv.ops.triton.variants import launch

ROWS, NUMBERS, WIDTH = 16, 32, 32
"""Queries of a program, numbers it makes of each, and dimensions it reads at a time."""


@triton.jit(do_not_specialize=["rows", "head_stride", "row_stride"])
def _project(
    query, heads, up, column, weight, centre, out, constant, scaling, rows, head_stride, row_stride,
    D: tl.constexpr, M: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, NUMBERS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    number = tl.program_id(2) * NUMBERS + tl.arange(0, NUMBERS)
    direction = number
    if column is not None:
        direction = tl.load(column + head * R + number, mask=number < R, other=0).to(tl.int32)
    own = query + tl.load(heads + head) * head_stride + row[:, None] * row_stride
    along = tl.zeros([ROWS, NUMBERS], tl.float32)
    with_centre = tl.zeros([ROWS], tl.float32)
    for first in range(0, D, WIDTH):
        d = first + tl.arange(0, WIDTH)
        q = tl.load(own + d[None, :], mask=(row[:, None] < rows) & (d[None, :] < D), other=0.0).to(tl.float32)
        inside = (d[:, None] < D) & (number[None, :] < R)
        tile = tl.load(up + (head * D + d[:, None]) * M + direction[None, :], mask=inside, other=0.0)
        along = tl.dot(q, tile.to(tl.float32), along, input_precision="ieee")
        with_centre += tl.sum(q * tl.load(centre + head * D + d, mask=d < D, other=0.0)[None, :], 1)
    along *= scaling
    if weight is not None:
        along *= tl.load(weight + head * R + number, mask=number < R, other=0).to(tl.float32)[None, :]
    where = out + (head * rows + row[:, None]) * R + number[None, :]
    tl.store(where, along, mask=(row[:, None] < rows) & (number[None, :] < R))
    if tl.program_id(2) == 0:
        tl.store(constant + head * rows + row, with_centre * scaling, mask=row < rows)


def project(
    query: torch.Tensor,
    heads: torch.Tensor,
    scaling: float,
    up: torch.Tensor,
    centre: torch.Tensor,
    column: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Digest.project`: queries `(K, rows, D)` times `up` `(n, D, m)`, `(n, rows, r)` float32, and their products
    with `centre` `(n, 1, D)`.

    column, weight `(n, r)`: the direction that each number belongs to and what it is multiplied by; None: the numbers
    are the directions.
    """
    (_, rows, d), (n, _, m) = query.shape, up.shape
    numbers = m if column is None else column.shape[1]
    if query.stride(-1) != 1:
        query = query.contiguous()
    out = torch.empty((n, rows, numbers), dtype=torch.float32, device=query.device)
    constant = torch.empty((n, rows), dtype=torch.float32, device=query.device)
    launch(
        _project, (n, triton.cdiv(rows, ROWS), triton.cdiv(numbers, NUMBERS)),
        query, heads, up, column, weight, centre, out, constant,
        scaling, rows, query.stride(0), query.stride(1),
        D=d, M=m, R=numbers, ROWS=ROWS, NUMBERS=NUMBERS, WIDTH=WIDTH,
    )  # fmt: skip
    return out, constant
