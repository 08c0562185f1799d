"""Foresight: chunks are copied for the query that a layer is about to have."""

from __future__ import annotations

from collections.abc import Sequence

from tieredkv.cache.layer import TieredLayer
from tieredkv.environment.ambient import settled
from tieredkv.memory.ledger import on_device
from tieredkv.models.sight import Sight


class Foresight:
    """What a cache does with predictions of its layers' queries (`models.sight.Foresight`)."""

    def __init__(self, layers: Sequence[TieredLayer]) -> None:
        self._layers = layers

    def wants(self, layer: int, tokens: int) -> bool:
        """In a decoding step, for a layer that ranks chunks and has no readers: their steps would come between."""
        own = self._layers[layer]
        if tokens != 1 or own.sealed is None or own.readers:
            return False
        return own.sealed.retrieval is not None and own.sealed.retrieval.foresees

    @settled
    def foresee(self, layer: int, sight: Sight) -> None:
        own = self._layers[layer]
        assert own.sealed is not None
        query = sight.rotated(sight.query)[0].to(own.dtype)
        with on_device(own.device):
            own.sealed.foresee(query, sight.scaling)
