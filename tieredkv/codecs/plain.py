"""Keys and values as the model made them. A record is `(2, C, D)` of the model's dtype: exact."""

from __future__ import annotations

import torch

from tieredkv.codecs.base import Codec, Fit


class Plain(Codec):
    """The model's dtype."""

    bits = key_bits = value_bits = 16
    needs_fit = False

    @property
    def chunk_bytes(self) -> int:
        return 2 * self.chunk_tokens * self.head_dim * self.dtype.itemsize

    def fields(self, records: torch.Tensor) -> tuple[torch.Tensor, ...]:
        both = records.view(self.dtype).unflatten(-1, (2, self.chunk_tokens, self.head_dim))
        return both[..., 0, :, :], both[..., 1, :, :]

    def encode(self, keys: torch.Tensor, values: torch.Tensor, fit: Fit | None) -> tuple[torch.Tensor, ...]:
        return keys, values

    def decode(self, fields: tuple[torch.Tensor, ...], fit: Fit | None) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = fields
        return keys.float(), values.float()

    def decode_keys(self, fields: tuple[torch.Tensor, ...], fit: Fit | None) -> torch.Tensor:
        return fields[0].float()

    def decode_to(
        self, keys: torch.Tensor, values: torch.Tensor | None, records: torch.Tensor, fit: Fit | None
    ) -> None:
        fields = self.fields(records)
        keys.copy_(fields[0])
        if values is not None:
            values.copy_(fields[1])

    def logits(self, turned: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
        return turned @ self._part(records, 0).mT

    def mixed(self, weights: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
        return weights @ self._part(records, 1)

    def _part(self, records: torch.Tensor, part: int) -> torch.Tensor:
        """Keys (part 0) or values (1) of records `(K, m, B)`: `(K, m * C, D)` float32."""
        size = self.chunk_bytes // 2
        numbers = records[..., part * size : (part + 1) * size].view(self.dtype).float()
        return numbers.reshape(len(records), -1, self.head_dim)
