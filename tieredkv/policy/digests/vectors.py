"""Digests of a few vectors per chunk, each stored in 4 or 8 bits per number with a scale.

Shapes: `C` chunk tokens, `n` chunks, `K` KV heads, `G` query heads per KV head, `D` head dim, `W` packed bytes of a
vector.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch

from tieredkv.policy.digests.base import FLOAT32, Digest, Fitted

SCALE_BYTES = 2
POWER_STEPS = 10
"""Steps of the power iteration. Its direction need not be exact: the ends are placed on the line it finds."""

Dot = Callable[[torch.Tensor, int], torch.Tensor]
"""Dot products `(K, G, n)` of queries `(K, G, D)` with vector v of every chunk's digest."""


def packed_bytes(head_dim: int, bits: int) -> int:
    """W: bytes of one vector."""
    return head_dim * bits // 8 + SCALE_BYTES


def pack(vectors: torch.Tensor, bits: int) -> torch.Tensor:
    """Vectors `(..., D)` as uint8 `(..., W)`: integers of `bits` bits, then their float16 scale.

    At 4 bits a byte holds a number of the first half of the channels in its low bits, one of the second in its high.
    """
    most = 2 ** (bits - 1) - 1
    scale = (vectors.abs().amax(-1, keepdim=True) / most).clamp(1e-7, 65504.0).half()
    numbers = (vectors / scale.float()).round().clamp(-most, most)
    if bits == 8:
        body = numbers.to(torch.int8).view(torch.uint8)
    else:
        low, high = (numbers + 8).to(torch.uint8).chunk(2, dim=-1)
        body = low | (high << 4)
    return torch.cat((body, scale.view(torch.uint8)), dim=-1)


def dots(query: torch.Tensor, packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Products `(K, G, n)` of queries `(K, G, D)`, float32, with packed vectors `(K, n, W)`."""
    body, scale = packed[..., :-SCALE_BYTES], packed[..., -SCALE_BYTES:].contiguous().view(torch.float16).float()
    if bits == 8:
        product = query @ body.view(torch.int8).float().transpose(1, 2)
    else:
        low, high = query.chunk(2, dim=-1)
        product = low @ (body & 15).float().transpose(1, 2)
        product = product.add_(high @ (body >> 4).float().transpose(1, 2)).sub_(8 * query.sum(-1, keepdim=True))
    return product.mul_(scale.transpose(1, 2))


class VectorDigest(Digest[Fitted]):
    """`count` vectors per chunk, from which a logit is estimated for the best key of the chunk."""

    count: ClassVar[int]

    @abstractmethod
    def vectors(self, keys: torch.Tensor) -> torch.Tensor:
        """The vectors `(..., count, D)` float32 of chunks of keys `(..., C, D)`."""

    @abstractmethod
    def score(self, query: torch.Tensor, dot: Dot) -> torch.Tensor:
        """Logits `(K, G, n)` of queries `(K, G, D)`, from their products with the vectors."""

    @property
    def chunk_bytes(self) -> int:
        return self.count * packed_bytes(self.head_dim, self.bits)

    def scratch_bytes(self, kv_heads: int, query_heads: int) -> int:
        """One vector, unpacked and in float32, and two products of every query head."""
        return kv_heads * self.head_dim * (FLOAT32 + 1) + 2 * FLOAT32 * query_heads

    def make(self, keys: torch.Tensor, fitted: Fitted) -> torch.Tensor:
        return pack(self.vectors(keys), self.bits).flatten(2)

    def chunk_logits(self, prepared: torch.Tensor, digests: torch.Tensor) -> torch.Tensor:
        packed = digests.unflatten(-1, (self.count, -1))
        return self.score(prepared, lambda query, v: dots(query, packed[:, :, v], self.bits))


class Mean(VectorDigest):
    """The mean key (the landmark of InfLLM and ReKV)."""

    name, count = "mean", 1

    def vectors(self, keys: torch.Tensor) -> torch.Tensor:
        return keys.float().mean(-2, keepdim=True)

    def score(self, query: torch.Tensor, dot: Dot) -> torch.Tensor:
        return dot(query, 0)


class MinMax(VectorDigest):
    """The box that holds all keys: low corner, then high (Quest, section 3)."""

    name, count = "minmax", 2

    def vectors(self, keys: torch.Tensor) -> torch.Tensor:
        return torch.stack((keys.amin(-2), keys.amax(-2)), dim=-2).float()

    def score(self, query: torch.Tensor, dot: Dot) -> torch.Tensor:
        """Largest product with a point of the box (Quest, eq. 1): sum over channels of max(q_d low_d, q_d high_d)."""
        return dot(query.clamp(max=0), 0).add_(dot(query.clamp(min=0), 1))


class Cuboid(MinMax):
    """A box that holds the bulk of the keys: low corner, then high (ArkVale, "cuboid-mean").

    It is centred between the extremes of each channel and reaches as far as the keys deviate from that centre on
    average: tighter than min/max, which a single outlier stretches.
    """

    name = "cuboid"

    def vectors(self, keys: torch.Tensor) -> torch.Tensor:
        keys = keys.float()
        centre = (keys.amin(-2) + keys.amax(-2)) / 2
        radius = (keys - centre.unsqueeze(-2)).abs().mean(-2)
        return torch.stack((centre - radius, centre + radius), dim=-2)


class Segment(VectorDigest):
    """The two ends of the line through the mean key along which the keys differ most, as far as they reach (ours).

    The direction is the first principal component, by power iteration on the `C x C` products of the centred keys,
    starting from the key furthest out. A box forgets which channels vary together; a line keeps the one combination
    that varies most.
    """

    name, count = "segment", 2

    def vectors(self, keys: torch.Tensor) -> torch.Tensor:
        keys = keys.float()
        centre = keys.mean(-2, keepdim=True)
        centred = keys - centre
        products = centred @ centred.transpose(-1, -2)
        furthest = products.diagonal(dim1=-2, dim2=-1).argmax(-1)
        place = products.gather(-1, furthest[..., None, None].expand(*products.shape[:-1], 1))
        for _ in range(POWER_STEPS):
            place = products @ place
            place = place / place.norm(dim=-2, keepdim=True).clamp(min=1e-12)
        direction = (centred * place).sum(-2)
        ends = torch.cat((place.amin(-2), place.amax(-2)), dim=-1).unsqueeze(-1)
        return centre + ends * direction.unsqueeze(-2)

    def score(self, query: torch.Tensor, dot: Dot) -> torch.Tensor:
        """Largest product with a point of the segment, which is at one of its ends."""
        return torch.maximum(dot(query, 0), dot(query, 1))
