"""Resident: the tokens of one layer that stay on the device while a prompt is prefilled."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Resident:
    """The first tokens of one layer, kept on the device while the prompt is prefilled: keys and values `(K, R, D)`."""

    keys: torch.Tensor
    values: torch.Tensor
    length: int = 0

    @property
    def room(self) -> int:
        """R."""
        return self.keys.shape[1]

    def put(self, keys: torch.Tensor, values: torch.Tensor, first: int) -> None:
        """Write what fits of the tokens `(K, n, D)` that follow the layer's first `first` ones. `count` keeps them."""
        if (take := self._room_after(first, keys.shape[1])) > 0:
            self.keys[:, first : first + take] = keys[:, :take]
            self.values[:, first : first + take] = values[:, :take]

    def count(self, tokens: int, first: int) -> None:
        """Keep what `put` has written of so many tokens."""
        self.length += self._room_after(first, tokens)

    def _room_after(self, first: int, tokens: int) -> int:
        """How many of `tokens` tokens after the layer's first `first` ones fit; 0 if not all of those are here."""
        return max(0, min(self.room - first, tokens)) if self.length == first else 0

    def append(self, keys: torch.Tensor, values: torch.Tensor, first: int) -> None:
        """`put` and `count`."""
        self.put(keys, values, first)
        self.count(keys.shape[1], first)

    def truncate(self, tokens: int) -> None:
        """Keep at most the first `tokens` tokens."""
        self.length = min(self.length, tokens)
