"""Writing a token's keys and values into pages of 8 bits; torch writes the others.

Shapes: `K` KV heads, `P` columns of a page table, `S` slots of the pool, `B` bytes of a record, `D` head dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tieredkv.codecs.packed import LARGEST, TINY
from tieredkv.ops import torch_ops
from tieredkv.ops.base import Pages
from tieredkv.ops.numba.compiled import compiled, from_half, to_half

MOST, LEAST_SCALE = np.float32(LARGEST), np.float32(TINY)


@compiled(as_written=True)
def _pack(row: Any, norms: Any, numbers: Any) -> Any:
    """As `codecs.packed.pack`: sets the numbers of a key or value `(D,)`, and returns its scale's bits."""
    largest = np.float32(0)
    for j in range(len(row)):
        size = abs(row[j] / norms[j])
        largest = size if not size <= largest else largest  # NaN stays
        if size != size:
            break
    bits = to_half(largest / MOST)
    scale = from_half(bits)
    divisor = LEAST_SCALE if scale < LEAST_SCALE else scale
    for j in range(len(row)):
        number = np.floor(row[j] / norms[j] / divisor + np.float32(0.5))
        number = MOST if number > MOST else number
        number = -MOST if number < -MOST else number
        numbers[j] = np.int8(number) if number == number else np.int8(0)
    return bits


APPENDED = (
    "void(float32[:,:], float32[:,:], float32[:,:,::1], int8[:,::1], int16[:,::1], int64, int32[:,::1], int32[:,::1], "
    "int32[:,::1])"
)


@compiled(signatures=[APPENDED], as_written=True)
def _append(
    keys: Any, values: Any, norms: Any, numbers: Any, halves: Any, c: Any, table: Any, lengths: Any, count: Any
) -> None:
    heads, d = keys.shape
    column, place = count[0, 0] // c, count[0, 0] % c
    for head in range(heads):
        slot = table[head, column]
        own, scales = numbers[slot], halves[slot, c * d :]
        scales[place] = _pack(keys[head], norms[head, 0], own[place * d : (place + 1) * d])
        scales[c + place] = _pack(values[head], norms[head, 1], own[(c + place) * d : (c + place + 1) * d])
        lengths[head, column] = place + 1
        count[head] += 1


def append(
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: Pages,
    table: torch.Tensor,
    lengths: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """As `Ops.append`."""
    if pages.codec.bits != 8 or pages.fit is None:
        torch_ops.append(keys, values, pages, table, lengths, count)
        return
    records = pages.records.view(torch.int8).numpy(), pages.records.view(torch.int16).numpy()
    new = keys.float().numpy(), values.float().numpy(), pages.fit.channels.numpy()
    _append(*new, *records, pages.codec.chunk_tokens, table.numpy(), lengths.numpy(), count.numpy())
