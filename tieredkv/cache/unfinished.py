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
from tieredkv.environment.ambient import settled

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

    chunks: int = 0
    """Whole chunks of every layer."""
    digested: tuple[Digested, ...] = ()
    """Of each tiered layer; empty: none."""

    def of_layer(self, number: int) -> Digested:
        """Of tiered layer `number`."""
        return self.digested[number] if self.digested else Digested()

    @staticmethod
    def of(plain: dict[str, Any]) -> Mark:
        """From `dataclasses.asdict` by way of JSON."""
        return Mark(plain["chunks"], tuple(Digested(**each) for each in plain["digested"]))


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What a cache holds: views of its memory, valid until its next call."""

    tokens: int
    mark: Mark
    """How much there is of `growing`, with what came before it."""
    growing: list[torch.Tensor]
    """Since the last mark, of each layer: chunks `(K, n, 2, C, D)`, and digests `(K, n, bytes)`. Rows are
    contiguous."""
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    """All that does not grow, by name; contiguous."""


@settled
def parts(cache: TieredCache, since: Mark) -> Parts:
    """What the cache holds that `since` does not cover, and its state. Raises `RuntimeError` in the middle of a
    call."""
    cache.check_between_calls()
    cache.device_tier.copies.drain()  # the host reads what was written back
    tokens = cache.get_seq_length()
    chunks, rest = divmod(tokens, cache.tiers.chunk_tokens)
    growing: list[torch.Tensor] = []
    state: dict[str, torch.Tensor] = {}
    digested: list[Digested] = []
    for layer in cache.tiered_layers:
        assert layer.host is not None
        assert layer.digests is not None
        packed, before = layer.digests.packed, since.of_layer(layer.index)
        now = Digested(layer.digests.kind, packed.shape[1], packed.shape[2])
        first = before.chunks if _continues(now, before) else 0
        growing += [layer.host.chunks(since.chunks, chunks), packed[:, first:]]
        digested.append(now)
        last = layer.host.arena.new_zeros((layer.host.num_heads, 2, layer.host.chunk_tokens, layer.host.head_dim))
        if rest:
            last[:, :, :rest] = layer.host.arena[:, chunks, :, :rest]
        own = {"last": last, **layer.digests.unsettled()}
        state |= {f"{_tiered(layer)}{name}": tensor for name, tensor in own.items()}
    snapshot = cache.untiered.copied()
    for number, held in enumerate(snapshot.states if snapshot else ()):
        state |= {f"{_untiered(number)}{name}": tensor for name, tensor in held.items()}
    return Parts(tokens, Mark(chunks, tuple(digested)), growing, state)


@settled
def restore(
    cache: TieredCache,
    tokens: int,
    state: dict[str, torch.Tensor],
    marks: Sequence[Mark],
    read: Callable[[int, list[torch.Tensor]], None],
    devices: dict[Any, torch.device],
) -> None:
    """Give an empty cache what another held after `tokens` tokens.

    state: as of its last parts. marks: of all its parts, in order. read: called with the number of each and tensors to
    fill as its `growing` was. devices: of each layer.
    """
    layers = cache.tiered_layers
    packed = []
    for layer in layers:
        last = state[f"{_tiered(layer)}last"]
        layer.begin(devices[layer], last.shape[0], last.shape[3], last.dtype)
        assert layer.host is not None
        layer.host.reserve(tokens)
        end = marks[-1].of_layer(layer.index) if marks else Digested()
        shape = (last.shape[0], end.chunks, end.nbytes)
        packed.append(torch.empty(shape, dtype=torch.uint8, device="cpu"))
    before = Mark()
    for number, mark in enumerate(marks):
        targets: list[torch.Tensor] = []
        for layer, digests in zip(layers, packed, strict=True):
            assert layer.host is not None
            targets.append(layer.host.arena[:, before.chunks : mark.chunks])
            was, now = before.of_layer(layer.index), mark.of_layer(layer.index)
            first = was.chunks if _continues(now, was) else 0
            if _continues(marks[-1].of_layer(layer.index), now):
                targets.append(digests[:, first : now.chunks])
            else:  # of a kind that was given up later
                shape = (digests.shape[0], now.chunks - first, now.nbytes)
                targets.append(torch.empty(shape, dtype=torch.uint8, device="cpu"))
        read(number, targets)
        before = mark
    for layer, digests in zip(layers, packed, strict=True):
        _complete(layer, tokens, digests, before.of_layer(layer.index).name, state)
    for number, held in enumerate(cache.untiered.layers):
        prefix = _untiered(number)
        own = {name.removeprefix(prefix): part for name, part in state.items() if name.startswith(prefix)}
        held.restore(own, tokens, devices[held])


def _complete(layer: TieredLayer, tokens: int, packed: torch.Tensor, kind: str, state: dict[str, torch.Tensor]) -> None:
    """Count a layer's tokens once its whole chunks are in place, and hand them to the device and to the digests."""
    host, digests, prefix = layer.host, layer.digests, _tiered(layer)
    assert host is not None
    assert digests is not None
    chunks, rest = divmod(tokens, host.chunk_tokens)
    if rest:
        host.arena[:, chunks, :, :rest] = state[f"{prefix}last"][:, :, :rest]
    host.advance(tokens)
    if (resident := layer.device_tier.residents.get(layer.index)) is not None:
        for first in range(0, min(tokens, resident.room), RESIDENT_TOKENS):
            stop = min(first + RESIDENT_TOKENS, tokens)
            resident.append(*host.copied(first, stop), first)
    own = {name.removeprefix(prefix): part for name, part in state.items() if name.startswith(prefix)}
    digests.resume(kind, packed, own)


def _continues(now: Digested, before: Digested) -> bool:
    """Whether the digests of `before` are the first of those of `now`."""
    return (now.name, now.nbytes) == (before.name, before.nbytes) and now.chunks >= before.chunks


def _tiered(layer: TieredLayer) -> str:
    return f"layers.{layer.index:03}."


def _untiered(number: int) -> str:
    return f"untiered.{number:03}."
