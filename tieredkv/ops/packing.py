"""Pages in 8 bits: a key or value is stored as integers from -127 to 127, times a scale of its own, times a norm for
each channel of its head. Half the size of 16 bits with hardly any loss: docs/log.md.

Some models' keys are a hundred times larger in a few channels than in the others (Qwen2's biases), so that with one
scale per key the others would be rounded to zero. Dividing each channel by its full size would round away the rest of a
key that is large in a usually small channel. A power of the size, as in SmoothQuant (arXiv 2211.10438), avoids both.

Shapes: `K` KV heads, `S` slots of the pool, `C` page tokens, `D` head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST = 127
FIRST_TOKENS, SAMPLE = 1024, 256
"""Channels are measured on `SAMPLE` of the prompt's `FIRST_TOKENS`; never on the very first, often an outlier."""
ABOVE = 100
"""A channel's size is the value that one in this many sampled tokens exceeds."""
AT_ONCE = 256
"""Tokens to pack at a time. Small, as the cap does not count their float32 copies."""
POWER = 0.75
"""Exponent of the size (docs/log.md)."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Scales and norms that turn a pool's int8 pages `(S, 2, C, D)` into keys and values of one layer."""

    scales: torch.Tensor
    """`(S, 2, C)` float16, of the whole pool: one for each token's key, one for its value."""
    norms: torch.Tensor
    """`(K, 2, D)` float32: divisor of each channel of keys, and of values."""


def channel_norms(chunks: torch.Tensor, tokens: int) -> torch.Tensor:
    """`Packing.norms` of a layer, `(K, 2, D)` float32; 1 for a channel that is always 0.

    chunks: `(K, n, 2, C, D)`, the prompt's, of which `tokens` tokens are written.
    """
    tokens = min(tokens, FIRST_TOKENS)
    first = chunks[:, : -(-tokens // chunks.shape[3])].transpose(1, 2).flatten(2, 3)
    sample = first[:, :, min(1, tokens - 1) : tokens : max(1, tokens // SAMPLE)]
    sizes = sample.abs().float().topk(sample.shape[2] // ABOVE + 1, dim=2).values[:, :, -1]
    return torch.where(sizes > 0, sizes**POWER, 1.0)


def norm_bytes(heads: int, head_dim: int) -> int:
    """Bytes of the norms of `heads` KV heads."""
    return heads * 2 * head_dim * torch.float32.itemsize


def packed_bytes(tokens: int, head_dim: int) -> int:
    """Bytes of packed keys and values of `tokens` tokens of one KV head."""
    return 2 * tokens * (head_dim + torch.float16.itemsize)


def pack(rows: torch.Tensor, norms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values `(..., D)` -> numbers `(..., D)` int8 and scales `(...)` float16. norms `(..., D)`.

    A key that is not finite, or millions of times its channels' norms, gets a scale that is not finite, and is unpacked
    to NaN.
    """
    steps = rows.float() / norms
    scales = (steps.abs().amax(-1) / LARGEST).half()
    steps /= scales.float().clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    steps.add_(0.5).floor_().clamp_(-LARGEST, LARGEST).nan_to_num_()
    return steps.to(torch.int8), scales


def rounded(tokens: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Keys or values `(K, n, D)` as packed pages return them, in their own dtype. norms `(K, D)`."""
    norms = norms.unsqueeze(1)
    return unpack(*pack(tokens, norms), norms).to(tokens.dtype)


def unpack(numbers: torch.Tensor, scales: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """The reverse of `pack`, `(..., D)` float32; off by at most half a scale times the norm."""
    return numbers.float() * scales.float().unsqueeze(-1) * norms
