"""Sketches: every key in half its dimensions and 4 or 8 bits, by which chunks are ranked token by token (ours).

A digest of a whole chunk hides the one key in it that a query looks for; sketches keep every key. Attention logits are
products of queries and keys, so the directions that matter are those in which queries are strong and keys differ.
Shapes: `K` KV heads, `n` chunks, `C` chunk tokens, `G` query heads per KV head, `D` head dim, `r` directions, D / 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from tieredkv.policy.digests.base import FLOAT32, Digest, Fitted

DAMPING = 1e-3
"""Added to the queries' second moment, relative to its mean, so that no direction has weight zero."""


@dataclass(frozen=True, slots=True)
class Basis(Fitted):
    """Directions of one layer's keys, scaled by the quantisation step along each."""

    down: torch.Tensor
    """`(K, D, r)` float32: a key minus the centre, times this, is its sketch before rounding."""
    up: torch.Tensor
    """`(K, D, r)` float32: a query times this is what sketches are multiplied by."""
    centre: torch.Tensor
    """`(K, 1, D)` float32: mean key. Its product with a query is the same for all keys, so sketches leave it out."""

    def for_ranking(self, heads: torch.Tensor) -> Self:
        """Without `down`, which only digesting needs."""
        return type(self)(self.down[:0], self.up[heads], self.centre[heads])


class Sketch(Digest[Basis]):
    """A sketch of every key of the chunk."""

    name = "sketch"
    estimates_mass = True
    fitted_type = Basis

    @property
    def directions(self) -> int:
        """r: half the dimensions; even at 4 bits, where two numbers share a byte."""
        return self.head_dim // 2 - (self.head_dim // 2 % 2 if self.bits == 4 else 0)

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_tokens * self.directions * self.bits // 8

    @property
    def fitted_bytes(self) -> int:
        return FLOAT32 * self.head_dim * (2 * self.directions + 1)

    @property
    def ranking_fitted_bytes(self) -> int:
        return FLOAT32 * self.head_dim * (self.directions + 1)

    def scratch_bytes(self, kv_heads: int, query_heads: int) -> int:
        """Numbers unpacked at a time (at 4 bits half of them), also in float32, and three times every token's
        logits."""
        numbers = self.directions // (1 if self.bits == 8 else 2)
        return self.chunk_tokens * (kv_heads * numbers * (FLOAT32 + 1) + 3 * FLOAT32 * query_heads)

    def fit(self, query_moment: torch.Tensor, keys: torch.Tensor) -> Basis:
        """The best `r` directions for products with queries of this second moment.

        With W the root of the moment, the mean square of q.(k - c) over queries is |W (k - c)|^2, so the best subspace
        is that of the first principal components of W (k - c).
        """
        keys = keys.double()
        weigh, back = whitening(query_moment)
        centre = keys.mean(1, keepdim=True)
        centred = (keys - centre) @ weigh
        _, components = torch.linalg.eigh(centred.transpose(1, 2) @ centred)
        first = components.flip(-1)[:, :, : self.directions]
        reach = (centred @ first).abs().amax(1, keepdim=True).clamp(min=1e-12)
        step = reach / (2 ** (self.bits - 1) - 1)
        return Basis(
            down=(weigh @ first / step).float(),
            up=(back @ first * step).float(),
            centre=centre.float(),
        )

    def make(self, keys: torch.Tensor, fitted: Basis) -> torch.Tensor:
        """At 4 bits a byte holds a number of the first half of the directions in its low bits, one of the second in its
        high bits."""
        most = 2 ** (self.bits - 1) - 1
        centred = keys.flatten(1, 2).float() - fitted.centre
        numbers = (centred @ fitted.down).round().clamp(-most, most).unflatten(1, keys.shape[1:3])
        if self.bits == 8:
            return numbers.to(torch.int8).view(torch.uint8).flatten(2)
        low, high = (numbers + 8).to(torch.uint8).chunk(2, dim=-1)
        return (low | (high << 4)).flatten(2)

    def prepare(self, query: torch.Tensor, fitted: Basis) -> torch.Tensor:
        """Queries along the directions, `(K, G, r)`."""
        return query @ fitted.up

    def chunk_logits(self, prepared: torch.Tensor, digests: torch.Tensor) -> torch.Tensor:
        """Log of the sum of the tokens' exponentiated logits."""
        mass = chunk_mass(self._products(prepared, digests), self.chunk_tokens)
        return mass.add_(_unsigned_offset(prepared)) if self.bits == 4 else mass

    def _products(self, prepared: torch.Tensor, digests: torch.Tensor) -> torch.Tensor:
        """Products `(K, G, n * C)` with all sketches; at 4 bits without `_unsigned_offset`, the same for all tokens."""
        kv_heads, r = digests.shape[0], prepared.shape[-1]
        if self.bits == 8:
            return prepared @ digests.view(torch.int8).view(kv_heads, -1, r).float().mT
        halves = digests.view(kv_heads, -1, r // 2)
        low, high = prepared.chunk(2, dim=-1)
        products = low @ (halves & 15).float().mT
        return products.baddbmm_(high, (halves >> 4).float().mT)

    def constant(self, query: torch.Tensor, fitted: Basis) -> torch.Tensor:
        """The queries' products with the centre."""
        return (query @ fitted.centre.mT).squeeze(-1)


def whitening(query_moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W, the root of the queries' second moment, and its inverse, `(K, D, D)` float64: the mean square of a key's
    products with the queries is the squared length of W times the key."""
    moment = query_moment.double()
    mean = moment.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30).view(-1, 1, 1)
    damped = moment / mean + DAMPING * torch.eye(moment.shape[-1], dtype=torch.float64, device=moment.device)
    strength, axes = torch.linalg.eigh(damped)
    root = strength.clamp(min=DAMPING).sqrt().unsqueeze(1)
    return (axes * root) @ axes.mT, (axes / root) @ axes.mT


def chunk_mass(products: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
    """Log of the sum of the exponentials of each chunk's tokens, of logits `(K, G, n * C)`, which it overwrites."""
    # Subtract the best logit of all chunks, not of each chunk: what underflows is negligible beside the best.
    best = products.amax(-1, keepdim=True)
    mass = products.sub_(best).exp_().unflatten(-1, (-1, chunk_tokens))
    return (mass @ mass.new_ones(chunk_tokens)).log_().add_(best)


def _unsigned_offset(prepared: torch.Tensor) -> torch.Tensor:
    """`(K, G, 1)`: corrects products for 4-bit numbers from -8 to 7 being stored as 0 to 15."""
    return -8 * prepared.sum(-1, keepdim=True)
