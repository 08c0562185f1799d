"""The contract of a codec.

A *record* is the bytes of one chunk of one KV head: the keys and values of `C` consecutive tokens. It consists of
fields, each with a token axis, so that single tokens can be written and copied too. Records are copied as they are,
from tier to tier and to disk; attention reads them without a copy of the unpacked numbers.

Some codecs transform keys and values before they store them, by what `fit` has measured of a layer. Attention then
transforms its few queries and outputs instead of the many keys and values: `turned`, `constant` and `finished`.

Shapes: `K` KV heads, `C` chunk tokens, `B` bytes of a record, `D` head dim, `n` tokens, `r` query rows of a KV head,
`m` records.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

FIT_TOKENS, SAMPLE = 1024, 256
"""Codecs are fitted to `SAMPLE` of a prompt's `FIT_TOKENS` first tokens, without the very first, often an outlier."""
AT_ONCE, AT_ONCE_ON_A_CARD = 256, 4096
"""Tokens to encode or decode at a time. Few, as the cap does not count their float32 copies; on a card more, where
starting an operation on few would take longer than computing it."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What a codec has measured of one layer, the same for all of its tokens. Both `(K, 2, D)` float32: of keys, and of
    values."""

    centre: torch.Tensor
    """Subtracted from every key and value."""
    channels: torch.Tensor
    """How channels are transformed: of `packed`, the divisor of each; of `rotated`, the unit vector along which it
    reflects."""

    def to(self, device: torch.device) -> Self:
        return type(self)(self.centre.to(device), self.channels.to(device))

    def of_heads(self, heads: torch.Tensor | slice) -> Self:
        return type(self)(self.centre[heads], self.channels[heads])


def fit_state(fit: Fit | None) -> dict[str, torch.Tensor]:
    """A fit by name, for `fit_of`; empty without one."""
    return {} if fit is None else {"codec.centre": fit.centre, "codec.channels": fit.channels}


def fit_of(state: dict[str, torch.Tensor]) -> Fit | None:
    """From a state that contains a `fit_state`."""
    return Fit(state["codec.centre"], state["codec.channels"]) if "codec.channels" in state else None


def fit_sample(tokens: torch.Tensor) -> torch.Tensor:
    """The tokens of `(K, n, D)` that a codec is fitted to, `(K, s, D)` float32."""
    n = min(tokens.shape[1], FIT_TOKENS)
    return tokens[:, min(1, n - 1) : n : max(1, n // SAMPLE)].float()


class Codec(ABC):
    """How one chunk of one KV head is stored. Has no state besides its sizes."""

    bits: ClassVar[int]
    """Key of `CODECS`."""
    key_bits: ClassVar[int]
    value_bits: ClassVar[int]
    """Of a number, for kernels; 16 stands for the model's dtype."""
    needs_fit: ClassVar[bool] = True

    def __init__(self, chunk_tokens: int, head_dim: int, dtype: torch.dtype) -> None:
        """dtype: the model's, in which records of 16 bits are stored."""
        self.chunk_tokens, self.head_dim, self.dtype = chunk_tokens, head_dim, dtype

    @property
    @abstractmethod
    def chunk_bytes(self) -> int:
        """B: a multiple of 4."""

    def chunks_at_once(self, device: torch.device) -> int:
        """How many to encode or decode at a time."""
        return max(1, (AT_ONCE if device.type == "cpu" else AT_ONCE_ON_A_CARD) // self.chunk_tokens)

    @abstractmethod
    def fields(self, records: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views `(..., C, w)` of records `(..., B)` uint8, contiguous in their last axis. Together they cover all of a
        record but what rounds it up. Those at even places are all that `decode_keys` reads."""

    def fit(self, keys: torch.Tensor, values: torch.Tensor) -> Fit | None:
        """Measure a layer by the first tokens `(K, n, D)`, n > 0, of a prompt; None if `needs_fit` is False."""
        return None

    @abstractmethod
    def encode(self, keys: torch.Tensor, values: torch.Tensor, fit: Fit | None) -> tuple[torch.Tensor, ...]:
        """What to store of tokens `(K, n, D)`: each of `fields` as `(K, n, w)`, on the device of the tokens, as `fit`
        must be. A number that is not finite is decoded to one that is not."""

    @abstractmethod
    def decode(self, fields: tuple[torch.Tensor, ...], fit: Fit | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(K, n, D)` float32, from what `encode` returned or views of it."""

    @abstractmethod
    def decode_keys(self, fields: tuple[torch.Tensor, ...], fit: Fit | None) -> torch.Tensor:
        """The keys that `decode` returns."""

    def decode_to(
        self, keys: torch.Tensor, values: torch.Tensor | None, records: torch.Tensor, fit: Fit | None
    ) -> None:
        """Decode records `(K, m, B)` into `(K, m, C, D)` of any dtype. values: None: the keys alone."""
        at_once = self.chunks_at_once(records.device)
        for begin in range(0, records.shape[1], at_once):
            part = slice(begin, begin + at_once)
            fields, shape = tokens_of(self.fields(records[:, part])), keys[:, part].shape
            if values is None:
                keys[:, part] = self.decode_keys(fields, fit).view(shape)
            else:
                both = self.decode(fields, fit)
                keys[:, part], values[:, part] = (decoded.view(shape) for decoded in both)

    # ---- attention to records

    def turned(self, query: torch.Tensor, fit: Fit | None) -> torch.Tensor:
        """Queries `(K, r, D)` float32 as `logits` takes them."""
        return query

    def constant(self, query: torch.Tensor, fit: Fit | None) -> torch.Tensor | None:
        """What `logits` leaves out: `(K, r)`, the same for every token; None: nothing."""
        return None

    @abstractmethod
    def logits(self, turned: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
        """Products `(K, r, m * C)` float32 of turned queries with the keys of records `(K, m, B)`; but `constant`."""

    @abstractmethod
    def mixed(self, weights: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
        """The values of records `(K, m, B)` added up by weights `(K, r, m * C)` float32: `(K, r, D)`, for
        `finished`."""

    def finished(self, mixed: torch.Tensor, fit: Fit | None) -> torch.Tensor:
        """The output, from what `mixed` returned for weights whose sum is 1, or a merge of several by such weights."""
        return mixed


def tokens_of(fields: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Fields `(K, m, C, w)` of whole chunks, token after token: `(K, m * C, w)`."""
    return tuple(field.flatten(1, 2) for field in fields)
