"""Host tiers, pools and tokens for tests of kernels that move and read records. Shapes as of `ops.base`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tieredkv.codecs import CODECS, codec_for
from tieredkv.codecs.base import Codec, Fit
from tieredkv.ops.base import Pages


def on_host(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` in host memory that a kernel on `device` can read."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


@dataclass
class Chunks:
    """A host tier of one layer: a `Source`."""

    codec: Codec
    records: torch.Tensor

    def on_host(self, device: torch.device) -> Chunks:
        return Chunks(self.codec, on_host(self.records, device))


def fit_of(bits: int, heads: int, d: int) -> Fit:
    """What heads have in common: channels differ much in size. The same at every call."""
    centre, norms = torch.rand(2, heads, 2, d, generator=torch.Generator().manual_seed(d))
    norms = norms**2 * 2 + 0.01
    return Fit(centre * 6 - 2, norms / norms.norm(dim=-1, keepdim=True) if bits == 4 else norms)


def encoded(codec: Codec, keys: torch.Tensor, values: torch.Tensor, fit: Fit) -> torch.Tensor:
    """Records `(K, m, B)` of keys and values `(K, m * C, D)`; what the codec does not write is 0."""
    records = torch.zeros(len(keys), keys.shape[1] // codec.chunk_tokens, codec.chunk_bytes, dtype=torch.uint8)
    for field, stored in zip(codec.fields(records), codec.encode(keys, values, fit), strict=True):
        field.copy_(stored.unflatten(1, (-1, codec.chunk_tokens)))
    return records


def chunks_of(bits: int, tokens: torch.Tensor, c: int) -> Chunks:
    """Keys and values `(2, K, n, D)` in the host tier."""
    codec = codec_for(bits, c, tokens.shape[-1], tokens.dtype)
    return Chunks(codec, encoded(codec, *tokens, fit_of(bits, tokens.shape[1], tokens.shape[-1])))


def empty_pool(bits: int, slots: int, heads: int, c: int, d: int, dtype: torch.dtype, device: torch.device) -> Pages:
    codec = codec_for(bits, c, d, dtype)
    records = torch.zeros(slots, codec.chunk_bytes, dtype=torch.uint8, device=device)
    return Pages(codec, records, fit_of(bits, heads, d).to(device) if codec.needs_fit else None)


def moved(pages: Pages, device: torch.device) -> Pages:
    return Pages(pages.codec, pages.records.to(device), None if pages.fit is None else pages.fit.to(device))


def odd_tokens(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Keys and values `(..., D)`, some of which are hard to pack: all zero, not finite, very large, very small."""
    tokens = torch.randn(shape)
    rows = tokens.view(-1, shape[-1])
    rows[0] = 0
    rows[1, 3], rows[2, 5] = float("nan"), -float("inf")
    rows[3], rows[4] = rows[3] * 3e4, rows[4] * 1e-6
    return tokens.to(dtype)


def assert_encoded_alike(got: Pages, want: Pages) -> None:
    """Bitwise; on a card and in 4 bits, numbers halfway between two steps may be rounded either way."""
    bits, on_card = want.codec.bits, got.records.device.type == "cuda"
    near = 1 if on_card or bits == 4 else 0
    fields = zip(got.codec.fields(got.records.cpu()), want.codec.fields(want.records), strict=True)
    for found, wanted in fields:
        if wanted.dtype.is_floating_point:
            torch.testing.assert_close(found, wanted, atol=0, rtol=near * 1e-3, equal_nan=True)
            continue
        parts = [(found & 15, wanted & 15), (found >> 4, wanted >> 4)] if bits == 4 else [(found, wanted)]
        for numbers, numbers_wanted in parts:
            torch.testing.assert_close(numbers.int(), numbers_wanted.int(), atol=near, rtol=0)
            assert (numbers != numbers_wanted).float().mean() < 0.01


BITS = pytest.mark.parametrize("bits", sorted(CODECS), ids="{} bits".format)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SIZES = pytest.mark.parametrize(("c", "d"), [(8, 64), (12, 80), (32, 128)])
FROM_HOST = pytest.mark.parametrize(
    ("bits", "page_bits", "dtype"),
    [(16, 16, torch.float32), (16, 16, torch.bfloat16), (16, 8, torch.float32), (16, 8, torch.bfloat16),
     (16, 8, torch.float16), (8, 8, torch.bfloat16), (4, 4, torch.bfloat16)],
    ids=str,
)  # fmt: skip
"""Of the host tier, and of the pages."""
