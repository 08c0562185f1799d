"""4 bits: the layer's mean taken off, a rotation of each head's channels, a scale of each key and value.

A constant that all keys of a head share, which some models' biases make large, would take most of the few steps that 4
bits have. It is the same for all tokens, so its product with a query is one number per head and step, and the mean
value is added back once.

The rotation is a reflection, then a Hadamard matrix, which, as in QuaRot (arXiv 2404.00456), spreads what is large in a
few channels over all of them. Queries are rotated instead of keys, and outputs back instead of values. The reflection
makes the channels of the prompt's first token equal in size after the Hadamard matrix, so that 4 bits hold that token
without loss. Heads attend to it with most of their mass, and rounding it costs three times as much as rounding all
others (docs/log.md).
"""

from __future__ import annotations

from functools import cache

import torch

from tieredkv.codecs.base import Codec, Fit, fit_sample

LARGEST = 7.5
"""Numbers are -7.5, -6.5, ..., 7.5, and are stored with 7.5 added."""
TINY = torch.finfo(torch.float32).tiny


class Rotated(Codec):
    """A record is keys, then values, `(C, D / 2)` bytes each, then scales `(2, C)` float16.

    Byte j of a token holds number j in its low bits, and number j + D / 2 in its high bits.
    """

    bits = key_bits = value_bits = 4

    @property
    def chunk_bytes(self) -> int:
        return -(-2 * self.chunk_tokens * (self.head_dim // 2 + 2) // 4) * 4

    def fields(self, records: torch.Tensor) -> tuple[torch.Tensor, ...]:
        c, half = self.chunk_tokens, self.head_dim // 2
        both = records[..., : 2 * c * half].unflatten(-1, (2, c, half))
        scales = records[..., 2 * c * half : 2 * c * (half + 2)].view(torch.float16).unflatten(-1, (2, c, 1))
        return both[..., 0, :, :], both[..., 1, :, :], scales[..., 0, :, :], scales[..., 1, :, :]

    def fit(self, keys: torch.Tensor, values: torch.Tensor) -> Fit:
        centre = torch.stack([fit_sample(part).mean(1) for part in (keys, values)], dim=1)
        first = torch.stack((keys[:, 0], values[:, 0]), dim=1).float() - centre
        return Fit(centre, _mirror(first))

    def encode(self, keys: torch.Tensor, values: torch.Tensor, fit: Fit | None) -> tuple[torch.Tensor, ...]:
        assert fit is not None
        both, centre, mirror = (
            part.flatten(0, 1) for part in (torch.stack((keys, values), dim=1), fit.centre, fit.channels)
        )
        numbers, scales = _pack(both, centre.unsqueeze(1), mirror.unsqueeze(1))
        return *numbers.unflatten(0, (-1, 2)).unbind(1), *scales.unflatten(0, (-1, 2)).unbind(1)

    def decode(self, fields: tuple[torch.Tensor, ...], fit: Fit | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert fit is not None
        _, values, _, scales = fields
        return self.decode_keys(fields, fit), _unpack(values, scales, fit.centre[:, 1:], fit.channels[:, 1:])

    def decode_keys(self, fields: tuple[torch.Tensor, ...], fit: Fit | None) -> torch.Tensor:
        assert fit is not None
        keys, _, scales, _ = fields
        return _unpack(keys, scales, fit.centre[:, :1], fit.channels[:, :1])

    def turned(self, query: torch.Tensor, fit: Fit | None) -> torch.Tensor:
        assert fit is not None
        return reflected(query, fit.channels[:, :1]) @ hadamard(self.head_dim, query.device)

    def constant(self, query: torch.Tensor, fit: Fit | None) -> torch.Tensor:
        assert fit is not None
        return (query @ fit.centre[:, :1].mT).squeeze(-1)

    def logits(self, turned: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
        keys, (low, high) = self._part(records, 0), turned.chunk(2, dim=-1)
        offset = turned.sum(-1, keepdim=True).mul_(-LARGEST)
        products = torch.baddbmm(offset, low, self._tokens(keys & 15).mT)
        products.baddbmm_(high, self._tokens(keys >> 4).mT)
        return products.mul_(self._scales(records, 0))

    def mixed(self, weights: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
        values, weights = self._part(records, 1), weights * self._scales(records, 1)
        offset = weights.sum(-1, keepdim=True).mul_(-LARGEST)
        low = torch.baddbmm(offset, weights, self._tokens(values & 15))
        return torch.cat((low, torch.baddbmm(offset, weights, self._tokens(values >> 4))), dim=-1)

    def finished(self, mixed: torch.Tensor, fit: Fit | None) -> torch.Tensor:
        assert fit is not None
        return reflected(mixed @ hadamard(self.head_dim, mixed.device), fit.channels[:, 1:]) + fit.centre[:, 1:]

    def _part(self, records: torch.Tensor, part: int) -> torch.Tensor:
        """Bytes of keys (part 0) or values (1) of records `(K, m, B)`: `(K, m, C * D / 2)`."""
        size = self.chunk_tokens * self.head_dim // 2
        return records[..., part * size : (part + 1) * size]

    def _tokens(self, numbers: torch.Tensor) -> torch.Tensor:
        """`(K, m, C * D / 2)` as `(K, m * C, D / 2)` float32."""
        return numbers.float().reshape(len(numbers), -1, self.head_dim // 2)

    def _scales(self, records: torch.Tensor, part: int) -> torch.Tensor:
        """Scales of keys (part 0) or values (1) of records `(K, m, B)`: `(K, 1, m * C)` float32."""
        size, first = 2 * self.chunk_tokens, self.chunk_tokens * self.head_dim
        scales = records[..., first + part * size : first + (part + 1) * size].view(torch.float16).float()
        return scales.reshape(len(records), 1, -1)


@cache
def hadamard(size: int, device: torch.device) -> torch.Tensor:
    """A rotation `(size, size)` float32 that is its own inverse: of each block of as many channels as the largest power
    of two that divides `size`."""
    block = size & -size
    turn = torch.ones((1, 1), dtype=torch.float32, device="cpu")
    while len(turn) < block:
        turn = torch.cat((torch.cat((turn, turn), dim=1), torch.cat((turn, -turn), dim=1)))
    return torch.block_diag(*[turn / block**0.5] * (size // block)).to(device)


def reflected(rows: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
    """Rows `(K, n, D)` float32 reflected along the unit vectors `mirror` `(K, 1, D)`; as they are where that is 0."""
    return torch.baddbmm(rows, rows @ mirror.mT, mirror, alpha=-2)


def _mirror(rows: torch.Tensor) -> torch.Tensor:
    """The unit vectors `(..., D)` along which each of `rows` `(..., D)` float32 is reflected to one whose numbers the
    Hadamard matrix makes equal in size; 0 for a row of zeros, and for one that is not finite."""
    size = rows.shape[-1]
    target = hadamard(size, rows.device).sum(0) / size**0.5
    # Of the two such vectors, the further one: the difference from the other may be too small to be precise.
    along, length = (rows * target).sum(-1, keepdim=True), rows.norm(dim=-1, keepdim=True)
    across = rows + length.copysign(along) * target
    return torch.where((length > 0) & length.isfinite(), across / across.norm(dim=-1, keepdim=True), 0.0)


def _pack(rows: torch.Tensor, centre: torch.Tensor, mirror: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values `(K, n, D)` -> bytes `(K, n, D / 2)` and scales `(K, n, 1)` float16. The rest: `(K, 1, D)`."""
    turned = reflected(rows.float() - centre, mirror) @ hadamard(rows.shape[-1], rows.device)
    scales = (turned.abs().amax(-1, keepdim=True) / LARGEST).half()
    turned /= scales.float().clamp(min=TINY)
    numbers = turned.add_(LARGEST).round_().clamp_(0, 2 * LARGEST).nan_to_num_().to(torch.uint8)
    low, high = numbers.chunk(2, dim=-1)
    return low | (high << 4), scales


def _numbers(stored: torch.Tensor) -> torch.Tensor:
    """Bytes `(..., D / 2)` -> numbers `(..., D)` float32, with `LARGEST` added."""
    return torch.cat((stored & 15, stored >> 4), dim=-1).float()


def _unpack(stored: torch.Tensor, scales: torch.Tensor, centre: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
    """Inverse of `_pack`, float32."""
    turned = _numbers(stored).sub_(LARGEST) * scales.float()
    return reflected(turned @ hadamard(centre.shape[-1], stored.device), mirror) + centre
