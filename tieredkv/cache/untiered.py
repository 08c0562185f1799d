"""Untiered: the layers of a cache whose memory does not grow with the prompt, and the snapshot they go back to.

They are transformers' own, hold what the next token needs and no more, and so cannot forget tokens one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tieredkv.errors import OptionError

State = dict[str, torch.Tensor]
"""What a layer holds, by name: tensors in host memory that nothing else writes to."""


class UntieredLayer(Protocol):
    """A layer of fixed size."""

    kind: str
    """What a model with such layers has, for messages."""

    def get_seq_length(self) -> int:
        """Tokens it has seen."""

    @property
    def device_bytes(self) -> int:
        """Bytes allocated for what it holds."""

    def can_truncate(self, tokens: int) -> bool:
        """Whether it still has all that it held after the first `tokens` tokens. Always true of 0 and of its length."""

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens. Only where `can_truncate`."""

    def state(self) -> State:
        """A copy of what it holds."""

    def restore(self, state: State, tokens: int) -> None:
        """Hold again what it held when `state` was taken, after `tokens` tokens. Leaves `state` as it is."""

    def close(self) -> None:
        """Free its memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What all untiered layers held after the first `tokens` tokens, in host memory."""

    tokens: int
    states: tuple[State, ...]

    @property
    def nbytes(self) -> int:
        """Host memory it takes."""
        return sum(part.nbytes for state in self.states for part in state.values())


class Untiered:
    """The untiered layers of a cache, in the model's order; there may be none."""

    def __init__(self, layers: Sequence[UntieredLayer]) -> None:
        self._layers = layers
        self._snapshot: Snapshot | None = None

    @property
    def device_bytes(self) -> int:
        """Bytes allocated for what the layers hold now."""
        return sum(layer.device_bytes for layer in self._layers)

    @property
    def snapshot_bytes(self) -> int:
        """Host memory of the snapshot."""
        return 0 if self._snapshot is None else self._snapshot.nbytes

    def settle(self) -> None:
        """Take a snapshot of this length, in place of the one before. All layers must have seen the same tokens."""
        self._snapshot = None  # freed before the next is allocated
        if self._layers and (tokens := self._layers[0].get_seq_length()):
            self._snapshot = Snapshot(tokens, tuple(layer.state() for layer in self._layers))

    def _can_truncate(self, tokens: int) -> bool:
        return all(layer.can_truncate(tokens) for layer in self._layers)

    def check_truncate(self, tokens: int, length: int) -> None:
        """Raise `OptionError`, which names the possible lengths, unless `tokens` is one. length: the cache's."""
        settled = None if self._snapshot is None else self._snapshot.tokens
        if tokens == settled or self._can_truncate(tokens):
            return
        kinds = " and ".join(dict.fromkeys(layer.kind for layer in self._layers if not layer.can_truncate(tokens)))
        possible = (
            "only to 0. Call settle() at a length to go back to it later"
            if settled is None
            else f"only to 0 or to {settled}, where it was settled"
        )
        raise OptionError(f"a model with {kinds} cannot go back to {tokens} of {length} tokens, {possible}.")

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens, by the snapshot if need be. Only where `check_truncate` passes."""
        snapshot = self._snapshot
        if self._can_truncate(tokens):
            for layer in self._layers:
                layer.truncate(tokens)
        else:
            assert snapshot is not None
            assert snapshot.tokens == tokens
            for layer, state in zip(self._layers, snapshot.states, strict=True):
                layer.restore(state, tokens)
        if snapshot is not None and tokens < snapshot.tokens:
            self._snapshot = None  # other tokens may follow

    def close(self) -> None:
        """Free the layers' memory and the snapshot."""
        self._snapshot = None
        for layer in self._layers:
            layer.close()
