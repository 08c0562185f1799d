"""Decoding: all layers of a cache in the decode phase."""

from __future__ import annotations

from collections.abc import Sequence

from tieredkv.cache.counters import Counters
from tieredkv.cache.decode_phase import DecodePhase
from tieredkv.cache.layer_order import LayerOrder
from tieredkv.cache.sealed_layer import LayerPosition, SealedLayer
from tieredkv.environment.ambient import settled
from tieredkv.ops.base import Ops


class Decoding:
    """The decode phase of one seal. Ends when the cache takes prompt tokens again, or closes.

    Replaying a CUDA graph runs none of the model's Python code, so `advance` counts that step. Capturing a step counts
    it without running it; `go_back` undoes that.
    """

    def __init__(self, layers: Sequence[SealedLayer], phases: Sequence[DecodePhase], order: LayerOrder) -> None:
        """phases: one per device."""
        self._layers, self._phases, self._order = layers, phases, order

    @property
    def ops(self) -> Ops:
        """The operations of its steps."""
        return self._phases[0].ops

    @property
    def counters(self) -> Counters:
        """Counts of its steps, up to date: waits for the device."""
        for layer in self._layers:
            if layer.retrieval is not None:
                layer.retrieval.flush_counters()
        return self._phases[0].counters

    def advance(self) -> None:
        """Count one generated token. Raises `BudgetError` if there is no room for it."""
        for layer in self._layers:
            layer.advance()

    def position(self) -> tuple[LayerPosition, ...]:
        """The position of every layer, as counted in Python."""
        return tuple(layer.position() for layer in self._layers)

    def go_back(self, position: tuple[LayerPosition, ...]) -> None:
        """Undo every `advance` since `position` was taken, and a call that was interrupted since."""
        self._order.reset()
        for layer, own in zip(self._layers, position, strict=True):
            layer.go_back(own)

    @settled
    def record_step(self) -> None:
        """Record what the last step attended to, if the question has `looks`. Waits for the device."""
        if (looks := self._phases[0].looks) is not None:
            looks.add_step([phase.chunk_mass for phase in self._phases])
