"""Digests: the small stand-in for a chunk's keys by which chunks are ranked.

Digests of a chunk are `V` vectors, kept on the device in 4 or 8 bits per number and a scale each; those of single
tokens are in `policy.sketch`. `DIGESTS` names the kinds. Shapes: `C` chunk tokens, `n` chunks, `K` KV heads, `G` query
heads per KV head, `D` head dim, `W` packed bytes of a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tieredkv.policy.digests import sketch
from tieredkv.policy.digests.sketch import Basis

BITS = (4, 8)
SCALE_BYTES = 2
POWER_STEPS = 10
"""Of the power iteration: the direction need not be exact, as what it leaves is not used."""

Dot = Callable[[torch.Tensor, int], torch.Tensor]
"""Dot products `(K, G, n)` of queries `(K, G, D)` with vector v of every chunk's digest."""


@dataclass(frozen=True, slots=True)
class Digest:
    """One kind of digest."""

    packed_bytes: Callable[[int, int, int], int]
    """Bytes of one chunk's digest, of head dim, chunk tokens and bits."""
    make: Callable[[torch.Tensor, int, Basis | None], torch.Tensor]
    """Digests, uint8 `(K, n, bytes)`, of chunks of keys `(K, n, C, D)` in so many bits."""
    logits: Callable[[torch.Tensor, torch.Tensor, int, Basis | None], torch.Tensor]
    """Estimated product, `(K, G, n)` float32, of queries `(K, G, D)`, already scaled, with each chunk's best key; from
    digests as `make` gave them."""
    fitted: bool = False
    """Whether it needs a `Basis`."""


# ---- kinds


def mean(keys: torch.Tensor) -> torch.Tensor:
    """The mean key (the landmark of InfLLM and ReKV)."""
    return keys.float().mean(-2, keepdim=True)


def min_max(keys: torch.Tensor) -> torch.Tensor:
    """The box that holds all keys, low then high corner (Quest, section 3)."""
    return torch.stack((keys.amin(-2), keys.amax(-2)), dim=-2).float()


def cuboid_mean(keys: torch.Tensor) -> torch.Tensor:
    """A box that holds the bulk of the keys, low then high corner (ArkVale, "cuboid-mean").

    It is centred between the per-channel extremes and reaches as far as the keys deviate from that centre on average:
    tighter than min/max, which one outlier key stretches.
    """
    keys = keys.float()
    centre = (keys.amin(-2) + keys.amax(-2)) / 2
    radius = (keys - centre.unsqueeze(-2)).abs().mean(-2)
    return torch.stack((centre - radius, centre + radius), dim=-2)


def segment(keys: torch.Tensor) -> torch.Tensor:
    """The two ends of a line through the mean key along which the keys differ most, as far as they reach (ours).

    The direction is the first principal component, by power iteration on the `C x C` products of the centred keys,
    begun at the key furthest out. A box forgets which channels vary together; a line keeps the one combination that
    varies most.
    """
    keys = keys.float()
    centre = keys.mean(-2, keepdim=True)
    apart = keys - centre
    products = apart @ apart.transpose(-1, -2)
    furthest = products.diagonal(dim1=-2, dim2=-1).argmax(-1)
    place = products.gather(-1, furthest[..., None, None].expand(*products.shape[:-1], 1))
    for _ in range(POWER_STEPS):
        place = products @ place
        place = place / place.norm(dim=-2, keepdim=True).clamp(min=1e-12)
    direction = (apart * place).sum(-2)
    ends = torch.cat((place.amin(-2), place.amax(-2)), dim=-1).unsqueeze(-1)
    return centre + ends * direction.unsqueeze(-2)


def point_score(query: torch.Tensor, dot: Dot) -> torch.Tensor:
    """A digest that is itself a key."""
    return dot(query, 0)


def box_score(query: torch.Tensor, dot: Dot) -> torch.Tensor:
    """Largest product with a point of the box (Quest, eq. 1): sum over channels of max(q_d * low_d, q_d * high_d)."""
    return dot(query.clamp(max=0), 0).add_(dot(query.clamp(min=0), 1))


def end_score(query: torch.Tensor, dot: Dot) -> torch.Tensor:
    """Largest product with a point of the segment, which is at one of its ends."""
    return torch.maximum(dot(query, 0), dot(query, 1))


# ---- in few bits


def packed_bytes(head_dim: int, bits: int) -> int:
    """W: bytes of one vector."""
    return head_dim * bits // 8 + SCALE_BYTES


def pack(vectors: torch.Tensor, bits: int) -> torch.Tensor:
    """Vectors `(..., D)` as uint8 `(..., W)`: whole numbers of `bits` bits, then their float16 scale.

    At 4 bits a byte holds a number of the first half of the channels, and one of the second in its high bits.
    """
    most = 2 ** (bits - 1) - 1
    scale = (vectors.abs().amax(-1, keepdim=True) / most).clamp(1e-7, 65504.0).half()
    whole = (vectors / scale.float()).round().clamp(-most, most)
    if bits == 8:
        body = whole.to(torch.int8).view(torch.uint8)
    else:
        low, high = (whole + 8).to(torch.uint8).chunk(2, dim=-1)
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


# ---- by name


def _vectors(
    count: int, make: Callable[[torch.Tensor], torch.Tensor], score: Callable[[torch.Tensor, Dot], torch.Tensor]
) -> Digest:
    """A digest of `count` vectors per chunk."""

    def packed(keys: torch.Tensor, bits: int, basis: Basis | None) -> torch.Tensor:
        return pack(make(keys), bits).flatten(2)

    def logits(query: torch.Tensor, digests: torch.Tensor, bits: int, basis: Basis | None) -> torch.Tensor:
        vectors = digests.unflatten(-1, (count, -1))
        return score(query, lambda part, v: dots(part, vectors[:, :, v], bits))

    return Digest(lambda head_dim, chunk_tokens, bits: count * packed_bytes(head_dim, bits), packed, logits)


DIGESTS = {
    "mean": _vectors(1, mean, point_score),
    "minmax": _vectors(2, min_max, box_score),
    "cuboid": _vectors(2, cuboid_mean, box_score),
    "segment": _vectors(2, segment, end_score),
    "sketch": Digest(sketch.packed_bytes, sketch.pack, sketch.chunk_logits, fitted=True),
}
