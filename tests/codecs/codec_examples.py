"""Keys and values of a layer, and records of them."""

from __future__ import annotations

import torch

from tieredkv.codecs.base import Codec, Fit

HEADS = 2


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(
    n: int, size: int, dtype: torch.dtype = torch.float32, centre: float = 0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `(K, n, D)`: noise, and a constant of each head's channels, `centre` times as large, as biases
    make it."""
    constant = centre * rows(2, HEADS, 1, size, seed=seed + 1)
    keys, values = (rows(2, HEADS, n, size, seed=seed) + constant).to(dtype)
    return keys, values


def write(codec: Codec, records: torch.Tensor, first: int, fields: tuple[torch.Tensor, ...]) -> None:
    """Put what `encode` returned into records `(K, m, B)`, from token `first` on."""
    tokens = first + torch.arange(fields[0].shape[1])
    for place, field in zip(codec.fields(records), fields, strict=True):
        place[:, tokens // codec.chunk_tokens, tokens % codec.chunk_tokens] = field


def records_of(codec: Codec, keys: torch.Tensor, values: torch.Tensor, fit: Fit | None) -> torch.Tensor:
    """Records `(K, m, B)`; the rest of the last is zeros."""
    heads, n, _ = keys.shape
    records = torch.zeros((heads, -(-n // codec.chunk_tokens), codec.chunk_bytes), dtype=torch.uint8)
    write(codec, records, 0, codec.encode(keys, values, fit))
    return records


def decoded(codec: Codec, records: torch.Tensor, fit: Fit | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `(K, m * C, D)` of records."""
    return codec.decode(tuple(field.flatten(1, 2) for field in codec.fields(records)), fit)
