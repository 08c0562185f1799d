"""A card that is not there: a model and its cache on a CUDA device of torch's fake tensors, which have no values.

An operation on tensors of two devices raises there, and so does anything that would bring a value to the host. Triton's
wrappers run as they are; `launches.Recorder` notes what they would launch. Shapes, devices, the order of operations and
what each allocates are those of a card; values, times and kernels are not simulated.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tieredkv.cache.decode_phase import DecodePhase
from tieredkv.cache.fetching import FetchAhead, Fetching
from tieredkv.cache.layer_pages import LayerPages
from tieredkv.cache.ranking import Ranking, Reuse
from tieredkv.cache.recording import ChunkMass, Tally, UnseenMass
from tieredkv.cache.retrieval import Retrieval
from tieredkv.cache.sealed_layer import SealedLayer
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.codecs.base import Fit
from tieredkv.codecs.rotated import hadamard
from tieredkv.memory.arena import MemoryArena
from tieredkv.memory.host import HostLayer
from tieredkv.memory.pool import DevicePool
from tieredkv.memory.residency import Residency
from tieredkv.ops.base import Listing, Pages
from tieredkv.ops.select import OpTable, triton
from tieredkv.policy.correction import Correction
from tieredkv.policy.digests import Digest, Fitted

CARD = torch.device("cuda", 0)
PROGRAMS = 256
"""What `programs_for` says of the card: two for each of 128 processors, as an RTX 4090 has."""
HOST = ("dynamic",)
"""Attributes of a layer that are on the host."""
STATEFUL = (
    SealedLayer, LayerPages, Retrieval, Ranking, Reuse, Fetching, FetchAhead, Tally, UnseenMass, ChunkMass,
    Residency, DevicePool,
)  # fmt: skip
"""Parts of a layer that hold tensors."""


class Mover:
    """Moves what a decoding cache holds to the card, within `fake_card`: tensors lose their values, counts stay."""

    def __init__(self) -> None:
        self._moved: dict[int, tuple[Any, Any]] = {}

    def move(self, thing: Any) -> Any:
        """A fake of `thing` on the card, the same for all who hold it."""
        if id(thing) not in self._moved:
            self._moved[id(thing)] = thing, thing  # kept alive, so that its id is not reused; may contain itself
            self._moved[id(thing)] = thing, self._fake(thing)
        return self._moved[id(thing)][1]

    def _fake(self, thing: Any) -> Any:
        if isinstance(thing, torch.Tensor):
            return torch.empty_strided(thing.shape, thing.stride(), dtype=thing.dtype, device=CARD)
        if isinstance(thing, HostLayer):
            assert thing.records is not None
            host = copy.copy(thing)
            host._arena = MemoryArena.of(torch.empty(thing.records.shape, dtype=torch.uint8, device="cpu"))
            return host
        if isinstance(thing, OpTable):
            return triton()
        if isinstance(thing, Digest):
            return triton().digest(thing)
        if isinstance(thing, tuple):
            return tuple(map(self.move, thing))
        if isinstance(thing, Pages | Listing | Fit | Fitted | Correction | DecodePhase):
            names = [field.name for field in dataclasses.fields(thing) if field.name != "plan"]
            return dataclasses.replace(thing, **{name: self.move(getattr(thing, name)) for name in names})
        if isinstance(thing, STATEFUL):
            for name, value in vars(thing).items():
                if not (isinstance(thing, SealedLayer) and name in HOST):
                    setattr(thing, name, self.move(value))
        return thing


@contextmanager
def fake_card(patch: Any) -> Iterator[None]:
    """Inside the block, tensors are fake, and a CUDA device may be named. patch: pytest's `monkeypatch`."""
    patch.setattr(torch.cuda, "device", lambda device: nullcontext())
    patch.setattr("tieredkv.ops.triton.attend.programs_for", lambda device: PROGRAMS)
    hadamard.cache_clear()  # it would mix tensors of this mode and of others
    try:
        with FakeTensorMode():
            yield
    finally:
        hadamard.cache_clear()


@contextmanager
def on_card(cache: TieredCache) -> Iterator[None]:
    """Inside the block, a sealed cache is on the card, and can only decode. Within `fake_card`."""
    assert cache.decoding is not None
    mover = Mover()
    cache.device_tier.devices = [CARD]
    for layer in cache.tiered_layers:
        layer.device = CARD
        layer.host = mover.move(layer.host)
        mover.move(layer.sealed)
    cache.decoding._phases = [mover.move(phase) for phase in cache.decoding._phases]
    try:
        yield
    finally:
        cache.decoding = None  # whose counters have no values to flush


def move_model(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model on the card. Within `fake_card`."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CARD)
        memo[id(tensor)] = torch.nn.Parameter(fake, requires_grad=False) if tensor.is_leaf else fake
    return copy.deepcopy(model, memo)
