"""Attention over pages of 8 bits or of float32; torch reads the others.

Shapes: `K` KV heads, `r` query rows of one, `P` columns of a page table, `C` page tokens, `D` head dim, `T` tokens
attended to at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tieredkv.ops import torch_ops
from tieredkv.ops.base import Pages
from tieredkv.ops.numba.compiled import compiled, exp, from_half

TOKENS = 512
"""T, and at most a page more. Their logits stay in a processor's nearest cache."""
ROWS = 4
"""Query rows multiplied with a number once it is unpacked."""
NOTHING = np.float32(torch_ops.HIDDEN)
NEGLIGIBLE = np.float32(1e-30)
"""Share of the best token's weight."""


@compiled
def _dots(keys: Any, query: Any, first: int, n: int, logits: Any, at: int) -> None:
    """Products of four rows of queries `(r, D)`, from `first`, with the first n keys `(C, D)`; into logits `(r, T)`."""
    a, b, c, d = query[first], query[first + 1], query[first + 2], query[first + 3]
    for i in range(n):
        key = keys[i]
        s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for j in range(len(a)):
            x = np.float32(key[j])
            s0 += a[j] * x
            s1 += b[j] * x
            s2 += c[j] * x
            s3 += d[j] * x
        logits[first, at + i], logits[first + 1, at + i] = s0, s1
        logits[first + 2, at + i], logits[first + 3, at + i] = s2, s3


@compiled
def _mix(values: Any, weights: Any, first: int, n: int, at: int, a: Any, b: Any, c: Any, d: Any) -> None:
    """Add the first n values `(C, D)`, times four rows of weights `(r, T)`, to `(D,)` each."""
    p, q, r, s = weights[first], weights[first + 1], weights[first + 2], weights[first + 3]
    fours = n - n % 4
    for i in range(0, fours, 4):
        t = at + i
        p0, p1, p2, p3 = p[t], p[t + 1], p[t + 2], p[t + 3]
        q0, q1, q2, q3 = q[t], q[t + 1], q[t + 2], q[t + 3]
        r0, r1, r2, r3 = r[t], r[t + 1], r[t + 2], r[t + 3]
        s0, s1, s2, s3 = s[t], s[t + 1], s[t + 2], s[t + 3]
        v0, v1, v2, v3 = values[i], values[i + 1], values[i + 2], values[i + 3]
        for j in range(len(a)):
            x0, x1, x2, x3 = np.float32(v0[j]), np.float32(v1[j]), np.float32(v2[j]), np.float32(v3[j])
            a[j] += p0 * x0 + p1 * x1 + p2 * x2 + p3 * x3
            b[j] += q0 * x0 + q1 * x1 + q2 * x2 + q3 * x3
            c[j] += r0 * x0 + r1 * x1 + r2 * x2 + r3 * x3
            d[j] += s0 * x0 + s1 * x1 + s2 * x2 + s3 * x3
    for i in range(fours, n):
        v0, p0, q0, r0, s0 = values[i], p[at + i], q[at + i], r[at + i], s[at + i]
        for j in range(len(a)):
            x0 = np.float32(v0[j])
            a[j] += p0 * x0
            b[j] += q0 * x0
            c[j] += r0 * x0
            d[j] += s0 * x0


@compiled
def _times(row: Any, by: Any) -> None:
    for i in range(len(row)):
        row[i] *= by[i]


@compiled
def _scale(row: Any, by: Any) -> None:
    for i in range(len(row)):
        row[i] *= by


@compiled
def _sum(row: Any) -> Any:
    total = np.float32(0)
    for i in range(len(row)):
        total += row[i]
    return total


@compiled
def _weigh(row: Any, top: Any) -> Any:
    """Make logits weights relative to that of the logit `top`; returns their sum."""
    for i in range(len(row)):
        row[i] = exp(row[i] - top)
    return _sum(row)


@compiled
def _most(row: Any, most: Any) -> Any:
    """The largest of a row and `most`."""
    for i in range(len(row)):
        most = row[i] if row[i] > most else most
    return most


SIGNATURES = [
    f"boolean(float32[:,:,::1], {numbers}[:,::1], int16[:,::1], boolean, int32[:,::1], int32[:,::1], int64, "
    "float32[:,:,::1], float32[:,::1], float32[:,::1])"
    for numbers in ("int8", "float32")
]


@compiled(signatures=SIGNATURES)
def _attend(
    query: Any,
    numbers: Any,
    halves: Any,
    scaled: Any,
    table: Any,
    lengths: Any,
    c: Any,
    out: Any,
    lse: Any,
    page_lse: Any,
) -> Any:
    """Outputs `(K, r, D)` and lse `(K, r)` of queries `(K, >= r, D)`, and page_lse `(K * r, >= P)`, or `(0, 0)` for
    none. Returns whether every head has a token.

    numbers `(S, any)`, and the same records as halves: where `scaled`, scales follow the numbers.
    """
    (heads, padded, d), columns, rows = query.shape, table.shape[1], out.shape[1]
    weights = np.empty((padded, TOKENS + c), np.float32)
    key_scales, value_scales = np.empty(TOKENS + c, np.float32), np.empty(TOKENS + c, np.float32)
    total, top = np.empty(rows, np.float32), np.empty(rows, np.float32)
    weights[:] = 0
    for head in range(heads):
        mixed = np.zeros((padded, d), np.float32)
        total[:] = 0
        top[:] = NOTHING
        begin = 0
        while begin < columns:
            end, tokens = begin, 0
            while end < columns and tokens < TOKENS:
                n, slot = lengths[head, end], table[head, end]
                if n > 0:
                    keys = numbers[slot, : c * d].reshape((c, d))
                    for first in range(0, padded, ROWS):
                        _dots(keys, query[head], first, n, weights, tokens)
                    if scaled:
                        for i in range(n):
                            key_scales[tokens + i] = from_half(halves[slot, c * d + i])
                            value_scales[tokens + i] = from_half(halves[slot, c * d + c + i])
                tokens += n
                end += 1
            for row in range(rows):
                own = weights[row, :tokens]
                if scaled:
                    _times(own, key_scales)
                best = _most(own, top[row])
                if best > top[row]:
                    fading = np.exp(top[row] - best)
                    total[row] *= fading
                    _scale(mixed[row], fading)
                    top[row] = best
                total[row] += _weigh(own, best)
                if len(page_lse) > 0:
                    at = 0
                    for column in range(begin, end):
                        mass = _sum(own[at : at + lengths[head, column]])
                        at += lengths[head, column]
                        # NaN is not negligible.
                        page_lse[head * rows + row, column] = NOTHING if mass < NEGLIGIBLE else best + np.log(mass)
                if scaled:
                    _times(own, value_scales)
            for first in range(0, padded, ROWS):
                e, f, g, h = mixed[first], mixed[first + 1], mixed[first + 2], mixed[first + 3]
                at = 0
                for column in range(begin, end):
                    if lengths[head, column] > 0:
                        values = numbers[table[head, column], c * d : 2 * c * d].reshape((c, d))
                        _mix(values, weights, first, lengths[head, column], at, e, f, g, h)
                        at += lengths[head, column]
            begin = end
        if top[0] == NOTHING and total[0] == 0:
            return False
        for row in range(rows):
            for j in range(d):
                out[head, row, j] = mixed[row, j] / total[row]
            lse[head, row] = top[row] + np.log(total[row])
    return True


def paged_attention(
    query: torch.Tensor,
    pages: Pages,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    batch_pages: int,
    page_lse: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Ops.paged_attention`."""
    codec, (heads, n, d), kv_heads = pages.codec, query.shape, len(table)
    if codec.bits != 8 and not (codec.bits == 16 and codec.dtype == torch.float32):
        return torch_ops.paged_attention(query, pages, table, lengths, scaling, batch_pages, page_lse, dtype)
    rows = heads // kv_heads * n
    turned = torch.zeros((kv_heads, -(-rows // ROWS) * ROWS, d), dtype=torch.float32, device="cpu")
    torch.mul(codec.turned(query.reshape(kv_heads, rows, d).float(), pages.fit), scaling, out=turned[:, :rows])
    numbers = pages.records.view(torch.int8 if codec.bits == 8 else torch.float32)
    out = torch.empty((kv_heads, rows, d), dtype=torch.float32, device="cpu")
    lse = torch.empty((kv_heads, rows), dtype=torch.float32, device="cpu")
    of_pages = lse.new_empty((0, 0)) if page_lse is None else page_lse
    every = _attend(
        turned.numpy(), numbers.numpy(), pages.records.view(torch.int16).numpy(), codec.bits == 8,
        table.numpy(), lengths.numpy(), codec.chunk_tokens, out.numpy(), lse.numpy(), of_pages.numpy(),
    )  # fmt: skip
    if not every:
        raise ValueError("a KV head has no page to attend to")
    return codec.finished(out, pages.fit).to(dtype).view(heads, n, d), lse.view(heads, n)
