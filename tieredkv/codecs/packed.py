"""8 bits: integers from -127 to 127, times a scale of each key and value, times a norm of each channel of its head.

Some models' keys are a hundred times larger in a few channels than in the others (Qwen2's biases), so that with one
scale per key the others would be rounded to zero. Dividing each channel by its full size would round away the rest of a
key that is large in a usually small channel. A power of the size, as in SmoothQuant (arXiv 2211.10438), avoids both.
"""

from __future__ import annotations

import torch

from tieredkv.codecs.base import Codec, Fit, fit_sample

LARGEST = 127
ABOVE = 100
"""A channel's size is the value that one in this many sampled tokens exceeds."""
POWER = 0.75
"""Exponent of the size (docs/log.md)."""
TINY = torch.finfo(torch.float32).tiny


class Packed(Codec):
    """A record is numbers `(2, C, D)` int8, then scales `(2, C)` float16."""

    bits = key_bits = value_bits = 8

    @property
    def chunk_bytes(self) -> int:
        return -(-2 * self.chunk_tokens * (self.head_dim + 2) // 4) * 4

    def fields(self, records: torch.Tensor) -> tuple[torch.Tensor, ...]:
        c, numbers = self.chunk_tokens, self.chunk_tokens * self.head_dim
        both = records[..., : 2 * numbers].view(torch.int8).unflatten(-1, (2, c, self.head_dim))
        scales = records[..., 2 * numbers : 2 * (numbers + 2 * c)].view(torch.float16).unflatten(-1, (2, c, 1))
        return both[..., 0, :, :], both[..., 1, :, :], scales[..., 0, :, :], scales[..., 1, :, :]

    def fit(self, keys: torch.Tensor, values: torch.Tensor) -> Fit:
        norms = torch.stack([_norms(fit_sample(part)) for part in (keys, values)], dim=1)
        return Fit(torch.zeros_like(norms), norms)

    def encode(self, keys: torch.Tensor, values: torch.Tensor, fit: Fit | None) -> tuple[torch.Tensor, ...]:
        assert fit is not None
        numbers, scales = pack(torch.stack((keys, values), dim=1), fit.channels.unsqueeze(2))
        return *numbers.unbind(1), *scales.unbind(1)

    def decode(self, fields: tuple[torch.Tensor, ...], fit: Fit | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert fit is not None
        _, values, _, scales = fields
        return self.decode_keys(fields, fit), values * scales.float() * fit.channels[:, 1:]

    def decode_keys(self, fields: tuple[torch.Tensor, ...], fit: Fit | None) -> torch.Tensor:
        assert fit is not None
        keys, _, scales, _ = fields
        return keys * scales.float() * fit.channels[:, :1]

    def turned(self, query: torch.Tensor, fit: Fit | None) -> torch.Tensor:
        assert fit is not None
        return query * fit.channels[:, :1]

    def logits(self, turned: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
        return (turned @ self._part(records, 0).mT).mul_(self._scales(records, 0))

    def mixed(self, weights: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
        return (weights * self._scales(records, 1)) @ self._part(records, 1)

    def finished(self, mixed: torch.Tensor, fit: Fit | None) -> torch.Tensor:
        assert fit is not None
        return mixed * fit.channels[:, 1:]

    def _part(self, records: torch.Tensor, part: int) -> torch.Tensor:
        """Numbers of keys (part 0) or values (1) of records `(K, m, B)`: `(K, m * C, D)` float32."""
        size = self.chunk_tokens * self.head_dim
        numbers = records[..., part * size : (part + 1) * size].view(torch.int8).float()
        return numbers.reshape(len(records), -1, self.head_dim)

    def _scales(self, records: torch.Tensor, part: int) -> torch.Tensor:
        """Scales of keys (part 0) or values (1) of records `(K, m, B)`: `(K, 1, m * C)` float32."""
        size, first = 2 * self.chunk_tokens, 2 * self.chunk_tokens * self.head_dim
        scales = records[..., first + part * size : first + (part + 1) * size].view(torch.float16).float()
        return scales.reshape(len(records), 1, -1)


def _norms(sample: torch.Tensor) -> torch.Tensor:
    """Divisor of each channel, `(K, D)`, by a sample `(K, s, D)`; 1 for a channel that is always 0."""
    sizes = sample.abs().topk(sample.shape[1] // ABOVE + 1, dim=1).values[:, -1]
    return torch.where(sizes > 0, sizes**POWER, 1.0)


def pack(rows: torch.Tensor, norms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values `(..., D)` -> numbers `(..., D)` int8 and scales `(..., 1)` float16. norms: as broadcast.

    A key that is not finite, or millions of times its channels' norms, gets a scale that is not finite, and is unpacked
    to NaN.
    """
    steps = rows.float() / norms
    scales = (steps.abs().amax(-1, keepdim=True) / LARGEST).half()
    steps /= scales.float().clamp(min=TINY)
    steps.add_(0.5).floor_().clamp_(-LARGEST, LARGEST).nan_to_num_()
    return steps.to(torch.int8), scales
