"""What can be tested of the CUDA path without a card: where tensors are, and that a step never waits.

torch's fake tensors have a device and no values: an operation on tensors of two devices raises, and so does anything
that would bring a value to the host. Kernels are replaced by functions that check where their arguments are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers import LateCopies, pressed, tier_options
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import tieredkv
from tieredkv import TieredCache
from tieredkv.cache.decode_phase import DecodePhase
from tieredkv.cache.fetching import FetchAhead, Fetching
from tieredkv.cache.layer_pages import LayerPages
from tieredkv.cache.looks import Looks
from tieredkv.cache.question import Question
from tieredkv.cache.ranking import Ranking, Reuse
from tieredkv.cache.recording import EstimatedMass, ExactMass, Tally
from tieredkv.cache.retrieval import Retrieval
from tieredkv.cache.sealed_layer import SealedLayer
from tieredkv.codecs.base import Fit
from tieredkv.environment.versions import cache_argument
from tieredkv.memory.host import HostLayer
from tieredkv.memory.pool import DevicePool
from tieredkv.memory.residency import Residency
from tieredkv.ops.base import Pages
from tieredkv.ops.select import TORCH, OpTable
from tieredkv.policy.digests import Digest, Fitted
from tieredkv.policy.digests.sketch import Sketch
from tieredkv.policy.digests.walsh import Walsh

CARD = torch.device("cuda", 0)


def on_card(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        assert tensor.device == CARD, tensor.device


def parts(pages: Pages) -> list[torch.Tensor]:
    return [pages.records, *([] if pages.fit is None else [pages.fit.centre, pages.fit.channels])]


class Fake:
    """Digests whose logits have a shape and a device, and no values."""

    def logits(self, prepared, digests, at_once):
        on_card(prepared, digests)
        return prepared.new_empty((*prepared.shape[:2], digests.shape[1]))


class FakeSketch(Fake, Sketch):
    pass


class FakeWalsh(Fake, Walsh):
    pass


FAKES = {kind.name: kind for kind in (FakeSketch, FakeWalsh)}


def fake_kernels() -> OpTable:
    """Operations with the signatures of the kernels: shapes and devices, no values."""

    def digest(digest):
        kind = FAKES.get(digest.name)
        return digest if kind is None else kind(digest.head_dim, digest.chunk_tokens, digest.bits)

    def choose(ranks, selected, slot_of, most):
        on_card(ranks, selected, slot_of)
        n = len(ranks)
        chosen, missed = torch.empty_like(ranks, dtype=torch.bool), ranks.new_empty((n, most), dtype=torch.int32)
        return chosen, missed, ranks.new_empty(n, dtype=torch.int32)

    def place(wanted, kept, misses, chunk_in, last_used, slots, step, most, table, heads, first):
        on_card(wanted, kept, misses, chunk_in, last_used, slots, step, heads, *([] if table is None else [table]))
        return slots.new_empty((len(slots), most))

    def gather(source, pages, heads, missed, victims, misses, slots, chunk_in, slot_of, first_chunk):
        assert source.records.device.type == "cpu"
        on_card(heads, missed, victims, misses, slots, chunk_in, slot_of, *parts(pages))

    def append(keys, values, pages, table, lengths, count):
        on_card(keys, values, table, lengths, count, *parts(pages))

    def paged_attention(query, pages, table, lengths, scaling, batch_pages, page_lse):
        on_card(query, table, lengths, *parts(pages), *([] if page_lse is None else [page_lse]))
        return query.new_empty(query.shape, dtype=torch.float32), query.new_empty(query.shape[:2], dtype=torch.float32)

    return dataclasses.replace(
        TORCH,
        name="fake",
        digest=digest,
        choose=choose,
        place=place,
        gather=gather,
        append=append,
        paged_attention=paged_attention,
    )


HOST = ("dynamic",)
"""Attributes of a layer that are on the host."""
STATEFUL = (
    SealedLayer, LayerPages, Retrieval, Ranking, Reuse, Fetching, FetchAhead, Tally, EstimatedMass, ExactMass,
    Residency, DevicePool,
)  # fmt: skip
"""Parts of a layer that hold tensors."""


class Card:
    """Moves a layer to a fake card: its tensors lose their values, the host tier and counts stay."""

    def __init__(self, host: HostLayer) -> None:
        self._host, self._ops = host, fake_kernels()
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
            return self._host
        if isinstance(thing, OpTable):
            return self._ops
        if isinstance(thing, Digest):
            return self._ops.digest(thing)
        if isinstance(thing, tuple):
            return tuple(map(self.move, thing))
        if isinstance(thing, Pages | Fit | Fitted | DecodePhase):
            names = [field.name for field in dataclasses.fields(thing) if field.name != "plan"]
            return dataclasses.replace(thing, **{name: self.move(getattr(thing, name)) for name in names})
        if isinstance(thing, STATEFUL):
            for name, value in vars(thing).items():
                if not (isinstance(thing, SealedLayer) and name in HOST):
                    setattr(thing, name, self.move(value))
        return thing


@pytest.mark.parametrize(
    "options",
    [{"theta": 2.0}, {"policy": "streaming"}, {"policy": "arkvale"}, {"policy": "quest"},
     {"reuse_above": 0.5, "prefetch": True}, {"adaptive": True}, {"gpu_kv_gb": 1.0},
     {"host_kv_bits": 16}, {"host_kv_bits": 16, "pack_pages": False}, {"host_kv_bits": 4}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded"])
def test_a_step_stays_on_the_card_and_never_waits(llama, long_ids, options, recorded):
    tiers = {**pressed(llama, 900, 1.5 if "quest" in options.values() else 0.6), "chunk_tokens": 8}
    made = TieredCache(llama.config, **tier_options(**{**tiers, **options}, text_window=16), copies=LateCopies())
    with torch.no_grad(), tieredkv.use_attention(llama), made as cache:
        cache.expect(Question(max_new_tokens=8, looks=Looks(8) if recorded else None))
        llama(long_ids, **cache_argument(cache))
        llama(long_ids[:, :1], **cache_argument(cache))
        cache.finish()
        sealed = cache.tiered_layers[1].sealed
    kv_heads = sealed.pages.host.num_heads
    with FakeTensorMode():
        host = HostLayer(kv_heads, 16, 8, torch.float32)
        host.reserve(1000)
        Card(host).move(sealed)
        rows = [torch.empty(heads, 1, 16, device=CARD) for heads in (4, kv_heads, kv_heads)]
        out = sealed.decode(*rows, 0.25)
        on_card(out)
        assert out.shape == (4, 1, 16)
        with pytest.raises(DataDependentOutputException):
            int(sealed.pages.lengths.sum())  # the premise of the test


def test_prefill_attends_on_the_card():
    from tieredkv.attention import exact

    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16):
            query = torch.empty(6, 40, 64, dtype=dtype, device=CARD)
            keys = torch.empty(2, 40, 64, dtype=dtype, device=CARD)
            for causal in (True, False):
                out, lse = exact.attend(query, keys, keys, 0.125, causal)
                assert (out.shape, lse.shape, lse.dtype) == ((6, 40, 64), (6, 40), torch.float32)
                on_card(out, lse)
