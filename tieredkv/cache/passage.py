"""Passage: the last prompt tokens of a cache, copied to host memory, to be put back without running the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.cache.untiered import Snapshot
from tieredkv.environment.ambient import settled
from tieredkv.planning.sizes import snapshot_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Passage:
    """Tokens `begin` to `stop` of a prompt."""

    begin: int
    stop: int
    layers: tuple[tuple[torch.Tensor, ...], ...]
    """What the host tier has stored, `(K, n, ...)`, of each tiered layer."""
    snapshot: Snapshot | None
    """What the layers that do not grow held after `stop`; None if the model has none."""

    @staticmethod
    def nbytes_of(cache: TieredCache, begin: int) -> int:
        """Host memory of the passage from token `begin` to the cache's length."""
        stop = cache.get_seq_length()
        token = sum(layer.host.token_bytes for layer in cache.tiered_layers if layer.host is not None)
        return (stop - begin) * token + snapshot_bytes(cache.shape, stop)

    @staticmethod
    @settled
    def of(cache: TieredCache, begin: int) -> Passage:
        """A copy of the tokens from `begin` on. Between two calls of the model, and not while the cache is sealed."""
        stop = cache.get_seq_length()
        cache.device_tier.copies.drain()  # the host reads what was written back
        hosts = (layer.host for layer in cache.tiered_layers)
        layers = tuple(host.stored(begin, stop) for host in hosts if host is not None)
        return Passage(begin, stop, layers, cache.untiered.copied())

    @settled
    def append_to(self, cache: TieredCache) -> None:
        """Let a cache that ends at `begin`, and is not sealed, end at `stop`. Leaves the passage as it is."""
        if cache.sealed or cache.get_seq_length() != self.begin:
            raise RuntimeError(f"the cache does not end at {self.begin}")
        cache.device_tier.copies.drain()  # appending may move what copies read
        for layer, fields in zip(cache.tiered_layers, self.layers, strict=True):
            layer.append_stored(fields)
        if self.snapshot is not None:
            cache.untiered.go_to(self.snapshot)

    def first(self, tokens: int) -> Passage | None:
        """At most the first `tokens` tokens; None where there are none, or where layers cannot be truncated to them."""
        if tokens >= self.stop - self.begin:
            return self
        if tokens <= 0 or self.snapshot is not None:
            return None
        layers = tuple(tuple(field[:, :tokens] for field in fields) for fields in self.layers)
        return replace(self, stop=self.begin + tokens, layers=layers)

    @property
    def nbytes(self) -> int:
        """Host memory it takes."""
        tiered = sum(part.untyped_storage().nbytes() for layer in self.layers for part in layer)
        return tiered + (0 if self.snapshot is None else self.snapshot.nbytes)
