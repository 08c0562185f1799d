"""Foresight: chunks are copied for the query that a layer is about to have."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
        return tokens == 1 and own.sealed is not None and not own.readers and own.sealed.foresees

    @settled
    def foresee(self, layer: int, sight: Sight) -> None:
        own = self._layers[layer]
        assert own.sealed is not None
        correction = own.sealed.correction

        def query() -> torch.Tensor:
            rows, predicted = (part.to(own.dtype) for part in sight.predicted())
            if correction is not None:
                predicted = correction.corrected(rows, predicted.flatten(1)).view_as(predicted)
            return sight.rotated(predicted)[0].to(own.dtype)

        with on_device(own.device):
            own.sealed.foresee(query, sight.scaling)

    def rows(self, layer: int, tokens: int) -> int:
        """In a prefill, of layers that may be wanted later."""
        own = self._layers[layer]
        if own.readers or own.sealed is not None or not own.device_tier.may_predict(own.prompt_length + tokens):
            return 0
        return own.correcting.rows(own.prompt_length, tokens)

    @settled
    def learn(self, layer: int, rows: torch.Tensor, missed: torch.Tensor, tokens: int) -> None:
        own = self._layers[layer]
        own.correcting.learn(rows, missed, own.prompt_length + tokens)
