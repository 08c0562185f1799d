"""A seal on a card: it waits for nothing, and leaves what a seal on the CPU leaves."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import LateCopies, pressed, tier_options
from pretend_card import CARD, PretendCard, pretend_kernels

import tieredkv
from tieredkv import TieredCache
from tieredkv.cache.fetching import Fetching
from tieredkv.cache.layer_pages import LayerPages
from tieredkv.cache.looks import Looks
from tieredkv.cache.question import Question
from tieredkv.environment.versions import cache_argument

CASES: dict[str, dict[str, Any]] = {
    "dynamic heads": {"theta": 2.0},
    "adaptive": {"theta": 2.0, "adaptive": True},
    "fetched ahead": {"theta": 2.0, "reuse_above": 0.5, "prefetch": True},
    "pruned heads": {"policy": "snapkv"},
    "boxes": {"policy": "arkvale"},
    "some layers whole": {"policy": "quest", "gpu_kv_gb": 1.5},
    "everything fits": {"gpu_kv_gb": 1.0, "budget_ratio": None},
    "everything fits, dynamic heads": {"gpu_kv_gb": 1.0, "budget_ratio": None, "theta": 2.0},
    "packed on the way": {"theta": 2.0, "host_kv_bits": 16},
    "4 bits": {"theta": 2.0, "host_kv_bits": 4},
}


def prepared(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> TieredCache:
    """A cache with a prompt, ready to be sealed."""
    tight = pressed(model, ids.shape[1], options.get("gpu_kv_gb", 0.6))
    given = {**tight, "chunk_tokens": 8, "text_window": 16, **options}
    given["gpu_kv_gb"] = 1.0 if options.get("gpu_kv_gb") == 1.0 else tight["gpu_kv_gb"]
    cache = TieredCache(model.config, **tier_options(**given), copies=LateCopies())
    cache.expect(Question(max_new_tokens=8, looks=Looks(8)))
    model(ids, **cache_argument(cache))
    return cache


def sealed_on_card(cache: TieredCache, patch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """Seals on the card; returns what waited for it, and the kernels that were launched."""
    launched: list[str] = []
    patch.setattr(torch.cuda, "device", lambda device: nullcontext())
    tier = cache.device_tier
    tier.devices, tier._ops = [CARD], pretend_kernels(launched)
    for layer in cache.tiered_layers:
        layer.device = CARD
    with PretendCard() as card:
        cache.seal()
    return card.waits, launched


@pytest.mark.parametrize("case", CASES)
def test_a_seal_waits_for_nothing_and_copies_chunks_once_a_layer(llama, long_ids, monkeypatch, case):
    with torch.no_grad(), tieredkv.use_attention(llama):
        ours, theirs = (prepared(llama, long_ids, CASES[case]) for _ in range(2))
        waits, launched = sealed_on_card(ours, monkeypatch)
        theirs.seal()
    assert waits == []
    layers = len(ours.tiered_layers)
    assert launched.count("fetch") == layers
    assert launched.count("keep") == (layers * 2 if case == "pruned heads" else 0)
    for mine, other in zip(ours.tiered_layers, theirs.tiered_layers, strict=True):
        for name in ("table", "lengths"):
            got = getattr(mine.sealed.pages, name)
            assert got.device == torch.device("cpu")  # outside the block
            assert torch.equal(got.as_subclass(torch.Tensor), getattr(other.sealed.pages, name)), name
    pools = [cache.device_tier.pools[0].records for cache in (ours, theirs)]
    assert torch.equal(pools[0].as_subclass(torch.Tensor), pools[1])


def test_more_tokens_take_no_more_launches(llama, long_ids, monkeypatch):
    counts = []
    for tokens in (300, 900):
        with torch.no_grad(), tieredkv.use_attention(llama):
            cache = prepared(llama, long_ids[:, :tokens], CASES["dynamic heads"])
            waits, launched = sealed_on_card(cache, monkeypatch)
        counts.append((waits, launched))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("kind", "wait", "named"),
    [
        (LayerPages, lambda pages: int(pages.table.sum()), "__int__"),
        (LayerPages, lambda pages: pages.lengths[pages.lengths > 0], "__getitem__ by a mask"),
        (LayerPages, lambda pages: pages.table.cpu(), "copy to the host"),
        (Fetching, lambda fetching: torch.zeros(3).to(CARD), "copy to the card"),
        (Fetching, lambda fetching: fetching.residency.slots.nonzero(), "nonzero"),
    ],
    ids=["a number", "a mask", "to the host", "to the card", "nonzero"],
)  # fmt: skip
def test_a_seal_that_waits_is_found(llama, long_ids, monkeypatch, kind, wait, named):
    begin = kind.__init__

    def waiting(self: Any, *given: Any, **options: Any) -> None:
        begin(self, *given, **options)
        wait(self)

    monkeypatch.setattr(kind, "__init__", waiting)
    with torch.no_grad(), tieredkv.use_attention(llama):
        waits, _ = sealed_on_card(prepared(llama, long_ids, CASES["dynamic heads"]), monkeypatch)
    assert waits == [named] * 3  # one in each layer
