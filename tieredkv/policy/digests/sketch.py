"""Sketches: every key in half its dimensions and 4 or 8 bits, by which chunks are ranked token by token (ours).

What stands for a whole chunk hides the one key in it that a lookup is after. A sketch keeps each: attention logits are
products of queries and keys, so the directions that matter are those in which queries are strong and keys differ.
Shapes: `K` KV heads, `n` chunks, `C` chunk tokens, `G` query heads per KV head, `D` head dim, `r` directions, D / 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DAMPING = 1e-3
"""Of the queries' second moment, relative to its mean: no direction counts for nothing."""


@dataclass(frozen=True, slots=True)
class Basis:
    """Directions of one layer's keys, with the steps in which numbers along them are counted."""

    down: torch.Tensor
    """`(K, D, r)` float32: a key, less the centre, times this is its sketch before rounding."""
    up: torch.Tensor
    """`(K, D, r)` float32: a query times this and a sketch is their product."""
    centre: torch.Tensor
    """`(K, 1, D)` float32: mean key. Its product with a query is the same for all keys, so it is left out."""

    def for_ranking(self, heads: torch.Tensor) -> Basis:
        """What it takes to rank the chunks of some heads: nothing can be sketched with it."""
        return Basis(self.down[:0], self.up[heads], self.centre[heads])

    def to(self, device: torch.device) -> Basis:
        """The same elsewhere."""
        return Basis(self.down.to(device), self.up.to(device), self.centre.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.down.nbytes + self.up.nbytes + self.centre.nbytes


def directions(head_dim: int, bits: int) -> int:
    """r: half the dimensions; an even number at 4 bits, of which two share a byte."""
    return head_dim // 2 - (head_dim // 2 % 2 if bits == 4 else 0)


def ranking_basis_bytes(head_dim: int, bits: int) -> int:
    """Bytes per head of a basis for ranking."""
    return 4 * head_dim * (directions(head_dim, bits) + 1)


def fit(query_moment: torch.Tensor, keys: torch.Tensor, bits: int) -> Basis:
    """The best `r` directions for products with queries of this second moment.

    query_moment `(K, D, D)`: sum of q q^T. keys `(K, m, D)`. With W the root of the moment, the mean square of
    q.(k - c) over queries is |W (k - c)|^2, so the best subspace is that of the first principal components of
    W (k - c).
    """
    keys, moment = keys.double(), query_moment.double()
    d = keys.shape[-1]
    mean = moment.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30).view(-1, 1, 1)
    damped = moment / mean + DAMPING * torch.eye(d, dtype=torch.float64, device=moment.device)
    strength, axes = torch.linalg.eigh(damped)
    root = axes * strength.clamp(min=DAMPING).sqrt().unsqueeze(1)
    weigh, back = root @ axes.transpose(1, 2), axes / strength.clamp(min=DAMPING).sqrt().unsqueeze(1)
    centre = keys.mean(1, keepdim=True)
    apart = (keys - centre) @ weigh
    _, components = torch.linalg.eigh(apart.transpose(1, 2) @ apart)
    first = components.flip(-1)[:, :, : directions(d, bits)]
    reach = (apart @ first).abs().amax(1, keepdim=True).clamp(min=1e-12)
    step = reach / (2 ** (bits - 1) - 1)
    return Basis(
        down=(weigh @ first / step).float(),
        up=(back @ axes.transpose(1, 2) @ first * step).float(),
        centre=centre.float(),
    )


def packed_bytes(head_dim: int, chunk_tokens: int, bits: int) -> int:
    """Bytes of one chunk's sketches."""
    return chunk_tokens * directions(head_dim, bits) * bits // 8


def pack(keys: torch.Tensor, bits: int, basis: Basis | None) -> torch.Tensor:
    """Sketches, uint8 `(K, n, bytes)`, of chunks of keys `(K, n, C, D)`.

    At 4 bits a byte holds a number of the first half of the directions, and one of the second in its high bits.
    """
    assert basis is not None
    most = 2 ** (bits - 1) - 1
    apart = keys.flatten(1, 2).float() - basis.centre
    whole = (apart @ basis.down).round().clamp(-most, most).unflatten(1, keys.shape[1:3])
    if bits == 8:
        return whole.to(torch.int8).view(torch.uint8).flatten(2)
    low, high = (whole + 8).to(torch.uint8).chunk(2, dim=-1)
    return (low | (high << 4)).flatten(2)


def token_logits(small: torch.Tensor, packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Products `(K, G, n * C)` of queries along the directions `(K, G, r)` with all sketches."""
    products = _products(small, packed, bits)
    return products.add_(_offset(small)) if bits == 4 else products


def _products(small: torch.Tensor, packed: torch.Tensor, bits: int) -> torch.Tensor:
    """`token_logits` less `_offset`, which is the same for all tokens of a query head."""
    kv_heads, r = packed.shape[0], small.shape[-1]
    if bits == 8:
        return small @ packed.view(torch.int8).view(kv_heads, -1, r).float().mT
    halves = packed.view(kv_heads, -1, r // 2)
    low, high = small.chunk(2, dim=-1)
    products = low @ (halves & 15).float().mT
    return products.baddbmm_(high, (halves >> 4).float().mT)


def _offset(small: torch.Tensor) -> torch.Tensor:
    """What 4-bit numbers, stored as 0 to 15 for -8 to 7, make products too large by, `(K, G, 1)`, negated."""
    return -8 * small.sum(-1, keepdim=True)


def sketch_logits(small: torch.Tensor, packed: torch.Tensor, bits: int, chunk_tokens: int) -> torch.Tensor:
    """Log of the attention mass of each chunk, `(K, G, n)`, up to the same constant for all chunks of a query head.

    small `(K, G, r)` float32: queries along the directions (`Basis.up`). packed `(K, n, bytes)`.
    """
    products = _products(small, packed, bits)
    # Shifted by the best key of all, not of each chunk: what float32 loses by it has no mass beside the best.
    best = products.amax(-1, keepdim=True)
    mass = products.sub_(best).exp_().unflatten(-1, (-1, chunk_tokens))
    return (mass @ mass.new_ones(chunk_tokens)).log_().add_(best + _offset(small) if bits == 4 else best)


def chunk_logits(query: torch.Tensor, packed: torch.Tensor, bits: int, basis: Basis | None) -> torch.Tensor:
    """The same for queries `(K, G, D)`."""
    assert basis is not None
    token_bytes = basis.up.shape[-1] * bits // 8
    return sketch_logits(query.float() @ basis.up, packed, bits, packed.shape[2] // token_bytes)
