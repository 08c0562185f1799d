"""The cache of a prompt that is not complete, as parts to write down: those that grow are named once, from a mark on.

Between two calls of the prefill. A cache that is restored from its parts goes on as the one they were taken of, to the
bit: with the same digests, and the same tokens resident on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tieredkv.cache.layer import TieredLayer
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.codecs import PLAIN, codec_for
from tieredkv.codecs.base import Codec, fit_of, fit_state
from tieredkv.environment.ambient import settled
from tieredkv.memory.host import HostLayer

RESIDENT_TOKENS = 2048
"""Tokens copied to the device at a time."""


@dataclass(frozen=True, slots=True)
class Digested:
    """How far a layer's chunks have been digested."""

    name: str = ""
    """The kind of digest."""
    chunks: int = 0
    nbytes: int = 0
    """Of one chunk's digest."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How much of a cache has been written down."""

    bits: int = PLAIN
    """Of the host tier."""
    chunks: int = 0
    """Whole chunks of every layer."""
    resident: int = 0
    """First tokens that are on the device as the model made them, and in the host tier in fewer bits."""
    digested: tuple[Digested, ...] = ()
    """Of each tiered layer; empty: none."""

    def of_layer(self, number: int) -> Digested:
        """Of tiered layer `number`."""
        return self.digested[number] if self.digested else Digested()

    def as_of(self, bits: int) -> Mark:
        """What of it counts once the host tier has `bits`: another codec starts over with all but the digests."""
        return self if self.bits == bits else Mark(bits, digested=self.digested)

    @staticmethod
    def of(plain: dict[str, Any]) -> Mark:
        """From `dataclasses.asdict` by way of JSON."""
        digested = tuple(Digested(**each) for each in plain["digested"])
        return Mark(plain["bits"], plain["chunks"], plain["resident"], digested)


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What a cache holds: views of its memory, valid until its next call."""

    tokens: int
    mark: Mark
    """How much there is of `growing`, with what came before it."""
    growing: list[torch.Tensor]
    """Since the last mark, of each layer: records `(K, n, B)`, digests `(K, n, bytes)`, and keys and values `(K, n, D)`
    of residents that the records hold in fewer bits. Rows are contiguous."""
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    """All that does not grow, by name; contiguous."""


@settled
def parts(cache: TieredCache, since: Mark) -> Parts:
    """What the cache holds that `since` does not cover, and its state. Raises `RuntimeError` in the middle of a
    call."""
    cache.check_between_calls()
    cache.device_tier.copies.drain()  # the host reads what was written back
    tokens, bits = cache.get_seq_length(), cache.device_tier.host_bits
    chunks, rest = divmod(tokens, cache.tiers.chunk_tokens)
    since = since.as_of(bits)
    growing: list[torch.Tensor] = []
    state: dict[str, torch.Tensor] = {}
    digested: list[Digested] = []
    residents = {} if bits == PLAIN else cache.device_tier.residents
    for layer in cache.tiered_layers:
        assert layer.host is not None
        assert layer.digests is not None
        packed, before = layer.digests.packed, since.of_layer(layer.index)
        now = Digested(layer.digests.kind, packed.shape[1], packed.shape[2])
        first = before.chunks if _continues(now, before) else 0
        growing += [layer.host.arena.whole()[:, since.chunks : chunks], packed[:, first:]]
        digested.append(now)
        if (resident := residents.get(layer.index)) is not None:
            growing += [part[:, since.resident : resident.length].cpu() for part in (resident.keys, resident.values)]
        fitted = {**fit_state(layer.host.fit), **layer.digests.unsettled(), **layer.correcting.unsettled()}
        own = {**_last(layer.host, chunks, rest), **fitted}
        state |= {f"{_tiered(layer)}{name}": tensor for name, tensor in own.items()}
    snapshot = cache.untiered.copied()
    for number, held in enumerate(snapshot.states if snapshot else ()):
        state |= {f"{_untiered(number)}{name}": tensor for name, tensor in held.items()}
    kept = min((resident.length for resident in residents.values()), default=0)
    return Parts(tokens, Mark(bits, chunks, kept, tuple(digested)), growing, state)


def new_bytes(cache: TieredCache, since: Mark) -> int:
    """Bytes of records that `since` does not cover."""
    done = since.as_of(cache.device_tier.host_bits).chunks * cache.tiers.chunk_tokens
    token = sum(layer.host.token_bytes for layer in cache.tiered_layers if layer.host is not None)
    return (cache.get_seq_length() - done) * token


def _last(host: HostLayer, chunks: int, rest: int) -> dict[str, torch.Tensor]:
    """The first `rest` tokens of chunk `chunks`, field by field."""
    begin = chunks * host.chunk_tokens
    return {f"last.{number}": field for number, field in enumerate(host.stored(begin, begin + rest))}


@settled
def restore(
    cache: TieredCache,
    tokens: int,
    codec: Codec,
    state: dict[str, torch.Tensor],
    marks: Sequence[Mark],
    read: Callable[[int, list[torch.Tensor]], None],
    devices: dict[Any, torch.device],
) -> None:
    """Give an empty cache what another held after `tokens` tokens.

    codec: of its host tier. state: as of its last parts. marks: of all its parts, in order. read: called with the
    number of each and tensors to fill as its `growing` was. devices: of each layer.
    """
    cache.device_tier.host_bits = codec.bits
    layers = [_Layer(layer, tokens, codec, state, marks, devices[layer]) for layer in cache.tiered_layers]
    before = Mark()
    for number, mark in enumerate(marks):
        before = before.as_of(mark.bits)
        targets = [layer.targets(before, mark) for layer in layers]
        read(number, [target for own in targets for target in own])
        for layer, filled in zip(layers, targets, strict=True):
            layer.take(before, mark, filled)
        before = mark
    if codec.bits != PLAIN and not before.resident:
        cache.device_tier.drop_residents()
    for layer in layers:
        layer.complete(tokens, before)
    for number, held in enumerate(cache.untiered.layers):
        prefix = _untiered(number)
        own = {name.removeprefix(prefix): part for name, part in state.items() if name.startswith(prefix)}
        held.restore(own, tokens, devices[held])


class _Layer:
    """A tiered layer while it is restored."""

    def __init__(
        self,
        layer: TieredLayer,
        tokens: int,
        codec: Codec,
        state: dict[str, torch.Tensor],
        marks: Sequence[Mark],
        device: torch.device,
    ) -> None:
        prefix = _tiered(layer)
        self._state = {name.removeprefix(prefix): part for name, part in state.items() if name.startswith(prefix)}
        heads = self._state["last.0"].shape[0]
        layer.begin(device, heads, codec.head_dim, codec.dtype)
        assert layer.host is not None
        self._layer, self._host, self._codec = layer, layer.host, codec
        if codec.bits != PLAIN:
            layer.host.adopt(layer.device_tier.new_arena(heads, codec.chunk_bytes), 0, codec, fit_of(self._state))
            layer.host.reserve(layer.room)
        layer.host.reserve(tokens)
        self._end = marks[-1].of_layer(layer.index) if marks else Digested()
        self._digests = _bytes(heads, self._end.chunks, self._end.nbytes)

    def targets(self, before: Mark, mark: Mark) -> list[torch.Tensor]:
        """Tensors for what the parts of `mark` have of the layer."""
        host, targets = self._host, []
        heads, first, stop = host.num_heads, before.chunks, mark.chunks
        if mark.bits == self._codec.bits and host.records is not None:
            targets.append(host.records[:, first:stop])
        else:
            c, d, dtype = host.chunk_tokens, host.head_dim, host.dtype
            targets.append(_bytes(heads, stop - first, codec_for(mark.bits, c, d, dtype).chunk_bytes))
        was, now = before.of_layer(self._layer.index), mark.of_layer(self._layer.index)
        done = was.chunks if _continues(now, was) else 0
        if _continues(self._end, now):
            targets.append(self._digests[:, done : now.chunks])
        else:  # of a kind that was given up later
            targets.append(_bytes(heads, now.chunks - done, now.nbytes))
        if mark.resident:
            shape = heads, mark.resident - before.resident, host.head_dim
            targets += [torch.empty(shape, dtype=host.dtype, device="cpu") for _ in range(2)]
        return targets

    def take(self, before: Mark, mark: Mark, filled: list[torch.Tensor]) -> None:
        """Keep what is not yet in place of `targets`, once they are filled."""
        if mark.bits != self._codec.bits:
            return
        if self._host.records is None:
            self._host.arena.write(before.chunks, filled[0])
        if mark.resident and (resident := self._layer.device_tier.residents.get(self._layer.index)) is not None:
            resident.append(filled[2], filled[3], before.resident)

    def complete(self, tokens: int, mark: Mark) -> None:
        """Count the tokens once all whole chunks are in place, and hand them to the device and to the digests."""
        host, digests, layer = self._host, self._layer.digests, self._layer
        assert digests is not None
        host.advance(tokens - tokens % host.chunk_tokens)
        last = [part for name, part in sorted(self._state.items()) if name.startswith("last.")]
        if last[0].shape[1]:
            host.append_stored(tuple(last))
        if self._codec.bits == PLAIN and (resident := layer.device_tier.residents.get(layer.index)) is not None:
            for first in range(0, min(tokens, resident.room), RESIDENT_TOKENS):
                stop = min(first + RESIDENT_TOKENS, tokens)
                resident.append(*host.decoded(first, stop), first)
        digests.resume(mark.of_layer(layer.index).name, self._digests, self._state)
        layer.correcting.resume(self._state)


def _bytes(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.uint8, device="cpu")


def _continues(now: Digested, before: Digested) -> bool:
    """Whether the digests of `before` are the first of those of `now`."""
    return (now.name, now.nbytes) == (before.name, before.nbytes) and now.chunks >= before.chunks


def _tiered(layer: TieredLayer) -> str:
    return f"layers.{layer.index:03}."


def _untiered(number: int) -> str:
    return f"untiered.{number:03}."
