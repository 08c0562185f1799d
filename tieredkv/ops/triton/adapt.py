"""How many chunks heads select next, by the mass that the last step did not see.

Shapes: `n` dynamic heads, `K` KV heads, `P` columns of the page table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tieredkv.ops.triton.variants import launch
from tieredkv.policy.select import MUCH_UNSEEN

COLUMNS = 1024
"""Columns that a program sets at a time."""


@triton.jit(do_not_specialize=["table_columns", "first", "columns"], do_not_specialize_on_alignment=["total"])
def _adapt(
    selected, unseen, least, most, total, lengths, heads, table_columns, first, columns,
    FULL: tl.constexpr, MUCH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    head, place = tl.program_id(0), tl.arange(0, COLUMNS)
    before, share = tl.load(selected + head), tl.load(unseen + head)
    quarter = (before + 3) // 4
    change = tl.where(share > MUCH, quarter, tl.where(share < MUCH / 2, -quarter, 0))
    now = tl.minimum(tl.maximum(before + change, tl.load(least + head)), tl.load(most + head))
    tl.store(total + head, tl.load(total + head) + now)
    row = lengths + tl.load(heads + head) * table_columns + first
    for begin in range(0, columns, COLUMNS):
        column = begin + place
        tl.store(row + column, tl.where(column < now, FULL, 0), mask=column < columns)
    tl.debug_barrier()  # not before all threads have read it
    tl.store(selected + head, now)


def adapt(
    selected: torch.Tensor,
    unseen: torch.Tensor,
    least: torch.Tensor,
    most: torch.Tensor,
    total: torch.Tensor,
    lengths: torch.Tensor,
    heads: torch.Tensor,
    first: int,
    columns: int,
    full: int,
) -> None:
    """As `Ops.adapt`."""
    launch(
        _adapt, (len(selected),),
        selected, unseen, least, most, total, lengths, heads, lengths.shape[1], first, columns,
        FULL=full, MUCH=MUCH_UNSEEN, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
