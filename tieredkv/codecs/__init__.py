"""Codecs: how the keys and values of a chunk are stored as bytes, in host memory, on the link, on the device, on disk.

`base` states the contract; every other module is one codec. A new one is a file and a line in `CODECS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tieredkv.codecs.base import Codec
from tieredkv.codecs.packed import Packed
from tieredkv.codecs.plain import Plain
from tieredkv.codecs.rotated import Rotated

PLAIN = 16
"""The bits that stand for the model's own dtype, even where that has 32."""

CODECS: dict[int, Callable[[int, int, torch.dtype], Codec]] = {PLAIN: Plain, 8: Packed, 4: Rotated}
"""By bits: takes chunk tokens, head dim and the model's dtype."""


def codec_for(bits: int, chunk_tokens: int, head_dim: int, dtype: torch.dtype) -> Codec:
    """The codec of so many bits, a key of `CODECS`."""
    return CODECS[bits](chunk_tokens, head_dim, dtype)
