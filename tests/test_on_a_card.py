"""What can be known of the CUDA path without a card: that tensors are where they must be, and that a step never waits.

torch's fake tensors have a device and no values: an operation on tensors of two devices raises, and so does anything
that would bring a value to the host. Kernels are replaced by what checks where their arguments are.
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
from tieredkv.cache.looks import Looks
from tieredkv.cache.question import Question
from tieredkv.environment.versions import cache_argument
from tieredkv.memory.host import HostLayer
from tieredkv.ops.base import Ops
from tieredkv.ops.packing import Packing
from tieredkv.ops.select import TORCH
from tieredkv.policy.digests import sketch

CARD = torch.device("cuda", 0)


def on_card(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        assert tensor.device == CARD, tensor.device


def parts(packing: Packing | None) -> list[torch.Tensor]:
    return [] if packing is None else [packing.scales, packing.norms]


def fake_kernels() -> Ops:
    """Operations with the signatures of the kernels: shapes and places, no values."""

    def sketch_logits(small, packed, bits, chunk_tokens):
        on_card(small, packed)
        return small.new_empty((*small.shape[:2], packed.shape[1]))

    def choose(ranks, selected, slot_of, most):
        on_card(ranks, selected, slot_of)
        n = len(ranks)
        chosen, missed = torch.empty_like(ranks, dtype=torch.bool), ranks.new_empty((n, most), dtype=torch.int32)
        return chosen, missed, ranks.new_empty(n, dtype=torch.int32)

    def place(wanted, kept, misses, chunk_in, last_used, slots, clock, most, table, heads, first):
        on_card(wanted, kept, misses, chunk_in, last_used, slots, clock, heads, *([] if table is None else [table]))
        return slots.new_empty((len(slots), most))

    def gather(arena, pages, heads, missed, victims, misses, slots, chunk_in, slot_of, first_chunk, packing):
        assert arena.device.type == "cpu"
        on_card(pages, heads, missed, victims, misses, slots, chunk_in, slot_of, *parts(packing))

    def append(keys, values, pages, table, lengths, held, packing):
        on_card(keys, values, pages, table, lengths, held, *parts(packing))

    def paged_attention(query, pages, table, lengths, scaling, batch_pages, packing):
        on_card(query, pages, table, lengths, *parts(packing))
        return query.new_empty(query.shape, dtype=torch.float32), query.new_empty(query.shape[:2], dtype=torch.float32)

    return dataclasses.replace(
        TORCH,
        name="fake",
        sketch_logits=sketch_logits,
        choose=choose,
        place=place,
        gather=gather,
        append=append,
        paged_attention=paged_attention,
    )


def moved(thing: Any, device: torch.device, known: dict[int, Any]) -> Any:
    """A fake of `thing` on `device`: tensors without values; the host tier and counts in Python stay."""
    if isinstance(thing, torch.Tensor):
        if id(thing) not in known:
            known[id(thing)] = torch.empty_strided(thing.shape, thing.stride(), dtype=thing.dtype, device=device)
        return known[id(thing)]
    if isinstance(thing, Packing):
        return Packing(moved(thing.scales, device, known), moved(thing.norms, device, known))
    if isinstance(thing, sketch.Basis):
        return sketch.Basis(*(moved(part, device, known) for part in (thing.down, thing.up, thing.centre)))
    return thing


HOST = ("heads", "dynamic")
"""Attributes that are on the host."""


def to_card(thing: Any, known: dict[int, Any]) -> None:
    """Replace the tensors that an object holds."""
    for name, value in vars(thing).items():
        if name not in HOST:
            setattr(thing, name, moved(value, CARD, known))


@pytest.mark.parametrize(
    "options",
    [{"theta": 2.0}, {"policy": "streaming"}, {"policy": "arkvale"}, {"policy": "quest"},
     {"reuse_above": 0.5, "prefetch": True}, {"adaptive": True}, {"gpu_kv_gb": 1.0}],
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
    kv_heads, known = sealed.pages.host.num_heads, {}
    with FakeTensorMode():
        host = sealed.pages.host = HostLayer(kv_heads, 16, 8, torch.float32)
        host.reserve(1000)
        if sealed.retrieval is not None:
            sealed.retrieval.host = host
            to_card(sealed.retrieval.residency, known)
            to_card(sealed.retrieval, known)
        to_card(sealed, known)
        to_card(sealed.pages, known)
        to_card(sealed.phase.pool, known)
        chunk_mass = moved(sealed.phase.chunk_mass, CARD, known)
        fake = dataclasses.replace(sealed.phase, ops=fake_kernels(), chunk_mass=chunk_mass)
        sealed.phase = sealed.pages.phase = fake
        if sealed.retrieval is not None:
            sealed.retrieval.phase = fake
        rows = [torch.empty(heads, 1, 16, device=CARD) for heads in (4, kv_heads, kv_heads)]
        out = sealed.steps(*rows, 0.25)
        on_card(out)
        assert out.shape == (4, 1, 16)
        with pytest.raises(DataDependentOutputException):
            int(sealed.pages.lengths.sum())  # what the test rests on


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
