"""Untiered: the layers of a cache whose memory does not grow with the prompt, and the snapshot they go back to.

They are transformers' own. They hold only what the next token needs, so they cannot forget tokens one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tieredkv.errors import OptionError

State = dict[str, torch.Tensor]
"""What a layer holds, by name: tensors in host memory that nothing else writes to."""


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in host memory."""
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


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

    def restore(self, state: State, tokens: int, device: torch.device | None = None) -> None:
        """Hold what a layer held when `state` was taken, after `tokens` tokens. Leaves `state` as it is.

        device: of a layer that has seen no tokens yet; None: where it is.
        """

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
        self.layers = layers
        self.snapshot: Snapshot | None = None
        """What `truncate` can restore; None until `settle`."""

    @property
    def device_bytes(self) -> int:
        """Bytes allocated for what the layers hold now."""
        return sum(layer.device_bytes for layer in self.layers)

    @property
    def snapshot_bytes(self) -> int:
        """Host memory of the snapshot."""
        return 0 if self.snapshot is None else self.snapshot.nbytes

    def settle(self) -> None:
        """Take a snapshot of this length, in place of the one before. All layers must have seen the same tokens."""
        self.snapshot = None  # freed before the next is allocated
        self.snapshot = self.copied()

    def copied(self) -> Snapshot | None:
        """A snapshot of this length, which `truncate` does not know; None without layers, or at length 0."""
        if not self.layers or not (tokens := self.layers[0].get_seq_length()):
            return None
        return Snapshot(tokens, tuple(layer.state() for layer in self.layers))

    def go_to(self, snapshot: Snapshot) -> None:
        """Hold what the layers held when `snapshot` was taken. Leaves it as it is."""
        for layer, state in zip(self.layers, snapshot.states, strict=True):
            layer.restore(state, snapshot.tokens)

    def restore(self, snapshot: Snapshot, devices: Sequence[torch.device]) -> None:
        """Begin with what the layers of another cache held. devices: of each layer."""
        self.snapshot = snapshot
        for layer, state, device in zip(self.layers, snapshot.states, devices, strict=True):
            layer.restore(state, snapshot.tokens, device)

    def _can_truncate(self, tokens: int) -> bool:
        return all(layer.can_truncate(tokens) for layer in self.layers)

    def check_truncate(self, tokens: int, length: int) -> None:
        """Raise `OptionError`, which names the possible lengths, unless `tokens` is one. length: the cache's."""
        settled = None if self.snapshot is None else self.snapshot.tokens
        if tokens == settled or self._can_truncate(tokens):
            return
        kinds = " and ".join(dict.fromkeys(layer.kind for layer in self.layers if not layer.can_truncate(tokens)))
        possible = (
            "only to 0. Call settle() at a length to go back to it later"
            if settled is None
            else f"only to 0 or to {settled}, where it was settled"
        )
        raise OptionError(f"a model with {kinds} cannot go back to {tokens} of {length} tokens, {possible}.")

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens, by the snapshot if need be. Only where `check_truncate` passes."""
        snapshot = self.snapshot
        if self._can_truncate(tokens):
            for layer in self.layers:
                layer.truncate(tokens)
        else:
            assert snapshot is not None
            assert snapshot.tokens == tokens
            self.go_to(snapshot)
        if snapshot is not None and tokens < snapshot.tokens:
            self.snapshot = None  # other tokens may follow

    def close(self) -> None:
        """Free the layers' memory and the snapshot."""
        self.snapshot = None
        for layer in self.layers:
            layer.close()
