"""LayerOrder: checks that every call of the model runs through all layers of its cache, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Layer(Protocol):
    """A layer of transformers' caches."""

    def get_seq_length(self) -> int:
        """Tokens it has seen."""


class LayerOrder:
    """Tracks which layer is next in a call of the model. A tiered layer is updated first and then attends; of any other
    only updates are checked. Tiered layers are known by their index among the tiered ones.

    A tiered layer may have readers: later layers of the model without keys and values of their own, which attend to
    this one's. In each call it attends once itself, and once for each of them.
    """

    def __init__(self) -> None:
        self._layers: list[Layer] = []
        self._tiered: list[Layer] = []
        self._attending: int | None = None
        """The tiered layer that was updated and has not attended yet."""
        self._readers: list[int] = []
        """Of each tiered layer."""
        self._unread: dict[int, int] = {}
        """How many readers of a tiered layer have not attended yet, in a call that has reached it."""

    def add(self, layer: Layer, tiered: bool, readers: int = 0) -> None:
        """Add the next layer of the model that has keys and values, or states."""
        self._layers.append(layer)
        if tiered:
            self._tiered.append(layer)
            self._readers.append(readers)

    def begin_call(self) -> None:
        """The first tiered layer is about to be updated. Raises `RuntimeError` if the previous call was interrupted."""
        # An untiered layer in front of it has its new tokens already.
        self._check_whole(self._layers if self._layers[0] is self._tiered[0] else self._tiered)

    def begin_layer(self, index: int) -> None:
        """Tiered layer `index` is updated. Raises `RuntimeError` if the previous one did not attend."""
        if self._attending is not None:
            raise RuntimeError(
                f"layer {self._attending} updated a TieredCache but did not attend through it, so its output ignores "
                "the cache: run the model inside `with tieredkv.use_attention(model):`."
            )
        self._attending = index

    def check_layer(self, index: int) -> bool:
        """Tiered layer `index` is about to attend. Returns whether it does for a reader.

        Raises `RuntimeError` unless it is the one that was updated, or has readers that have not attended yet.
        """
        for_reader = self._attending is None and self._unread.get(index, 0) > 0
        if self._attending != index and not for_reader:
            raise RuntimeError(f"layer {index} attends, but {self._attending} was updated")
        return for_reader

    def end_layer(self, index: int) -> bool:
        """Layer `index` has attended, itself or for a reader. Returns whether it was the last time in this call."""
        left = self._readers[index] if self._attending == index else self._unread.get(index, 0) - 1
        self._attending = None
        if left:
            self._unread[index] = left
        else:
            self._unread.pop(index, None)
        return not left

    def check_between_calls(self) -> None:
        """Raise `RuntimeError` if a call was interrupted, or is under way."""
        self._check_whole(self._layers)

    def _check_whole(self, layers: Sequence[Layer]) -> None:
        self._check_lengths(layers)
        if self._attending is not None or self._unread:
            raise self._interrupted()

    def check_untiered_layer(self, layer: Layer, tokens: int) -> None:
        """`layer` is about to be updated with `tokens` tokens. Raises `RuntimeError` unless it has seen all before."""
        if layer is self._layers[0]:
            self._check_lengths(self._layers)
        first = self._tiered[0]
        updated = self._layers.index(layer) > self._layers.index(first)
        if layer.get_seq_length() != first.get_seq_length() - (tokens if updated else 0):
            raise self._interrupted()

    def reset(self) -> None:
        """Forget a call that was interrupted, once the layers' lengths agree again."""
        self._attending = None
        self._unread = {}

    def _check_lengths(self, layers: Sequence[Layer]) -> None:
        if len({layer.get_seq_length() for layer in layers}) > 1:
            raise self._interrupted()

    def _interrupted(self) -> RuntimeError:
        least = min(layer.get_seq_length() for layer in self._layers)
        return RuntimeError(
            "the last forward did not run through all layers of this TieredCache: it was interrupted, or ran "
            f"outside `tieredkv.use_attention(model)`. Go back with truncate({least}) or less."
        )
