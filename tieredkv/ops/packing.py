"""Pages in 8 bits: a key or value is whole numbers from -127 to 127, times a scale of its own, times a norm for each
channel of its head. Half the room of 16 bits, and next to no loss: docs/log.md.

Some models' keys are a hundred times larger in a few channels than in the others (Qwen2's biases): one scale for all
of a key's channels would round the others away. Dividing by all of a channel's size would let those that are large once
in a while round the rest away instead; a power of it, as SmoothQuant (arXiv 2211.10438) divides its, does neither.

Shapes: `K` KV heads, `S` slots of the pool, `C` page tokens, `D` head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST = 127
FIRST_TOKENS, SAMPLE = 1024, 256
"""Of so many first tokens of a prompt, so many tell how large channels are; never the very first, often an outlier."""
ABOVE = 100
"""A channel's size is what one in so many of them passes."""
AT_ONCE = 256
"""Tokens that are packed at a time: their numbers in float32 are beside all that the cap counts."""
POWER = 0.75
"""Of that size (docs/log.md)."""


@dataclass(frozen=True, slots=True)
class Packing:
    """What turns the numbers in a pool's pages `(S, 2, C, D)`, int8, into keys and values of one layer."""

    scales: torch.Tensor
    """`(S, 2, C)` float16, the pool's: of each token's key, and of its value."""
    norms: torch.Tensor
    """`(K, 2, D)` float32, the layer's: what each channel of keys, and of values, is divided by."""


def channel_norms(chunks: torch.Tensor, tokens: int) -> torch.Tensor:
    """`Packing.norms` of a layer, `(K, 2, D)` float32. 1 where a channel is nothing but 0.

    chunks: `(K, n, 2, C, D)`, the prompt's, of which `tokens` tokens are written.
    """
    tokens = min(tokens, FIRST_TOKENS)
    begun = chunks[:, : -(-tokens // chunks.shape[3])].transpose(1, 2).flatten(2, 3)
    sample = begun[:, :, min(1, tokens - 1) : tokens : max(1, tokens // SAMPLE)]
    sizes = sample.abs().float().topk(sample.shape[2] // ABOVE + 1, dim=2).values[:, :, -1]
    return torch.where(sizes > 0, sizes**POWER, 1.0)


def norm_bytes(heads: int, head_dim: int) -> int:
    """Of the norms of `heads` KV heads."""
    return heads * 2 * head_dim * torch.float32.itemsize


def packed_bytes(tokens: int, head_dim: int) -> int:
    """Of keys and values of `tokens` tokens of one KV head."""
    return 2 * tokens * (head_dim + torch.float16.itemsize)


def pack(rows: torch.Tensor, norms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values `(..., D)` -> whole numbers `(..., D)` int8 and scales `(...)` float16. norms `(..., D)`.

    Where a key is not finite, or millions of times its channels' norms, its scale is not finite, and what comes out is
    no number.
    """
    steps = rows.float() / norms
    scales = (steps.abs().amax(-1) / LARGEST).half()
    steps /= scales.float().clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    steps.add_(0.5).floor_().clamp_(-LARGEST, LARGEST).nan_to_num_()
    return steps.to(torch.int8), scales


def rounded(tokens: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Keys or values `(K, n, D)` as they come out of packed pages, in their own dtype. norms `(K, D)`."""
    norms = norms.unsqueeze(1)
    return unpack(*pack(tokens, norms), norms).to(tokens.dtype)


def unpack(numbers: torch.Tensor, scales: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """The keys or values again, `(..., D)` float32: each within half a scale, times its norm."""
    return numbers.float() * scales.float().unsqueeze(-1) * norms
