"""Ranking of chunks: logits from sketches.

Shapes: `n` dynamic heads, `rows` queries of a head, `N` chunks, `C` chunk tokens, `r` directions of a sketch, `W` words
of a sketch, of eight numbers each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tieredkv.ops.numba.compiled import compiled, exp, log
from tieredkv.policy.digests import Digest
from tieredkv.policy.digests.sketch import Sketch

TOKENS = 1024
"""Tokens of a tile, whose logits for four queries stay in a processor's nearest cache."""
QUERIES = 4
"""Queries multiplied with a number once it is unpacked."""


@compiled
def _add_products(words: Any, query: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    """Add the products of four queries `(4, 8)` with the numbers in words `(t,)` to `(t,)` each."""
    a0, a1, a2, a3, a4, a5, a6, a7 = query[0]
    b0, b1, b2, b3, b4, b5, b6, b7 = query[1]
    c0, c1, c2, c3, c4, c5, c6, c7 = query[2]
    d0, d1, d2, d3, d4, d5, d6, d7 = query[3]
    for t in range(len(words)):
        x = words[t]
        x0, x1 = np.float32(np.int32(x & 15)), np.float32(np.int32((x >> 8) & 15))
        x2, x3 = np.float32(np.int32((x >> 16) & 15)), np.float32(np.int32((x >> 24) & 15))
        x4, x5 = np.float32(np.int32((x >> 4) & 15)), np.float32(np.int32((x >> 12) & 15))
        x6, x7 = np.float32(np.int32((x >> 20) & 15)), np.float32(np.int32((x >> 28) & 15))
        a[t] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3 + a4 * x4 + a5 * x5 + a6 * x6 + a7 * x7
        b[t] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3 + b4 * x4 + b5 * x5 + b6 * x6 + b7 * x7
        c[t] += c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3 + c4 * x4 + c5 * x5 + c6 * x6 + c7 * x7
        d[t] += d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3 + d4 * x4 + d5 * x5 + d6 * x6 + d7 * x7


@compiled
def _clear(row: Any) -> None:
    for i in range(len(row)):
        row[i] = 0


@compiled
def _larger(row: Any, best: Any) -> None:
    for i in range(len(row)):
        best[i] = row[i] if row[i] > best[i] else best[i]


@compiled
def _add_exponentials(row: Any, best: Any, total: Any) -> None:
    for i in range(len(row)):
        total[i] += exp(row[i] - best[i])


@compiled
def _log_mass(logits: Any, m: int, shift: Any, best: Any, total: Any, out: Any) -> None:
    """Log of the sum of the exponentials of each of m chunks' tokens, plus `shift`, from logits `(C * m,)`."""
    for i in range(m):
        best[i], total[i] = logits[i], 0
    for first in range(m, len(logits), m):
        _larger(logits[first : first + m], best)
    for first in range(0, len(logits), m):
        _add_exponentials(logits[first : first + m], best, total)
    for i in range(m):
        out[i] = best[i] + log(total[i]) + shift


@compiled
def tile_chunks(c: int) -> int:
    """Chunks of C tokens in a tile; the last tile of a head may have fewer."""
    return max(1, TOKENS // c)


@compiled
def _by_words(query: Any) -> Any:
    """Queries `(rows, r)` as `(W, rows, 8)`, in the order of the numbers in a word; rows rounded up to `QUERIES`."""
    rows, r = query.shape
    ordered = np.zeros((r // 8, -(-rows // QUERIES) * QUERIES, 8), np.float32)
    for row in range(rows):
        for j in range(r // 8):
            for k in range(4):
                ordered[j, row, k] = query[row, 4 * j + k]
                ordered[j, row, 4 + k] = query[row, r // 2 + 4 * j + k]
    return ordered


@compiled
def _tile_logits(tokens: Any, ordered: Any, row: int, each: Any) -> None:
    """Products of four queries, from `row`, with a tile's tokens, words `(W * t,)`; into `(4, t)`."""
    width = len(ordered)
    t = len(tokens) // width
    a, b, c, d = each[0], each[1], each[2], each[3]
    for i in range(QUERIES):
        _clear(each[i])
    for j in range(width):
        _add_products(tokens[j * t : j * t + t], ordered[j, row : row + QUERIES], a, b, c, d)


@compiled(signatures=["void(float32[:,:,::1], uint32[:,::1], int64, float32[:,:,::1])"])
def _sketch_logits(query: Any, words: Any, c: int, out: Any) -> None:
    """Logits `(n, rows, N)`, from queries `(n, rows, r)` and words `(n, N * C * W)` in tiles."""
    heads, rows, chunks = out.shape
    tile, r = tile_chunks(c), query.shape[2]
    each = np.empty((QUERIES, tile * c), np.float32)
    best, total = np.empty(tile, np.float32), np.empty(tile, np.float32)
    for head in range(heads):
        ordered = _by_words(query[head])
        for first in range(0, chunks, tile):
            m = min(tile, chunks - first)
            tokens = words[head, first * c * r // 8 : (first + m) * c * r // 8]
            for row in range(0, rows, QUERIES):
                _tile_logits(tokens, ordered, row, each)
                for i in range(min(QUERIES, rows - row)):
                    offset = np.float32(0)
                    for k in range(r):
                        offset -= 8 * query[head, row + i, k]  # stored numbers are 8 too large
                    _log_mass(each[i, : m * c], m, offset, best, total, out[head, row + i, first : first + m])


class CompiledSketch(Sketch):
    """`Sketch` in 4 bits, with compiled logits."""

    @property
    def _words(self) -> int:
        """Of a token's sketch."""
        return self.directions // 8

    def arranged(self, digests: torch.Tensor) -> torch.Tensor:
        """Tile by tile; in a tile, word by word of all tokens, first those at place 0 of each chunk: so that one
        instruction handles the numbers of many tokens."""
        heads, chunks, _ = digests.shape
        tile, arranged = tile_chunks(self.chunk_tokens), torch.empty_like(digests).contiguous()
        words = digests.contiguous().view(torch.int32).view(heads, chunks, self.chunk_tokens, self._words)
        tiles = zip(words.split(tile, 1), arranged.view(torch.int32).split(tile, 1), strict=True)
        for part, target in tiles:
            target.view(heads, -1).copy_(part.permute(0, 3, 2, 1).flatten(1))
        return arranged

    def logits(self, prepared: torch.Tensor, digests: torch.Tensor, at_once: int) -> torch.Tensor:
        heads, rows, _ = prepared.shape
        out = torch.empty((heads, rows, digests.shape[1]), dtype=torch.float32, device="cpu")
        words = digests.flatten(1).numpy().view(np.uint32)
        _sketch_logits(prepared.contiguous().numpy(), words, self.chunk_tokens, out.numpy())
        return out


def by_compiled(digest: Digest[Any]) -> Digest[Any]:
    """As `Ops.digest`."""
    if isinstance(digest, Sketch) and digest.bits == 4 and digest.directions % 8 == 0:
        return CompiledSketch(digest.head_dim, digest.chunk_tokens, digest.bits)
    return digest
