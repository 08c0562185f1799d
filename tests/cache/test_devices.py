"""A model spread over several devices: every layer's share of the device tier is where the layer is."""

from __future__ import annotations

import pytest
import torch
from helpers import RecordLogits, assert_near, cap_share, pressed, session_logits, tier_options

import tieredkv
from tieredkv.cache.layer import TieredLayer
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument

FIRST, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)
"""Tensors are on the one CPU whichever of these is asked for, but the two compare as two devices do."""


@pytest.fixture
def spread(monkeypatch):
    """Every other layer on another device."""
    initialise = TieredLayer.lazy_initialization

    def lazily(self, keys, values):
        initialise(self, keys, values)
        self.device = (FIRST, SECOND)[self.index % 2]
        devices = self.device_tier.devices
        devices[:] = [known for known in devices if known.index is not None]
        self.device_tier.place(self.device, keys.dtype)

    monkeypatch.setattr(TieredLayer, "lazy_initialization", lazily)


def answer(model, ids, share, **options):
    record = RecordLogits()
    tiers = {**pressed(model, ids.shape[1], share), "chunk_tokens": 8, "text_window": 16, **options}
    with tieredkv.use_attention(model), TieredCache(model.config, **tier_options(**tiers), max_new_tokens=12) as cache:
        model.generate(ids, **cache_argument(cache), max_new_tokens=12, do_sample=False, logits_processor=[record])
        assert cache.ledger.peak_bytes <= cache.tiers.cap_bytes
        pages = [len(pool.records) for pool in cache.device_tier.pools]
        sealed = [layer.sealed for layer in cache.tiered_layers]
        shares = [layer.phase.pool for layer in sealed]
    return torch.cat(record.seen), pages, shares


@pytest.mark.parametrize("options", [{}, {"policy": "streaming"}, {"policy": "arkvale"}], ids=str)
def test_logits_are_those_of_one_device(llama, long_ids, options, request):
    # A budget that fits both caps: what each of two devices keeps for itself takes a few bytes more.
    options = {**options, "budget_ratio": 0.2}
    alone, (pages,), _ = answer(llama, long_ids, 0.6, **options)
    request.getfixturevalue("spread")
    spread, each, pools = answer(llama, long_ids, 0.6, **options)
    assert_near(spread, alone)
    assert len(each) == 2
    assert sum(each) == pages
    assert pools[0] is pools[2] is not pools[1]


def test_the_tightest_cap_holds_for_all_devices_together(llama, long_ids, spread):
    _, pages, _ = answer(llama, long_ids, 0.3)
    assert len(pages) == 2


def test_evidence_adds_up_what_every_device_saw(video_model, processor, frames, request):
    def look():
        options = {"gpu_kv_gb": cap_share(video_model, 250, 0.9), "chunk_tokens": 8, "text_window": 8, "theta": 2.0}
        with tieredkv.open_session(
            video_model, frames, processor=processor, fps=4, **tier_options(**options), budget_ratio=0.3
        ) as session:
            found = session.ask("what colour was the star ?", max_new_tokens=5)
            return found.evidence.heat, session_logits(session, "what colour was the star ?", 5)

    heat, logits = look()
    request.getfixturevalue("spread")
    heat_spread, logits_spread = look()
    assert_near(logits_spread, logits)
    assert_near(heat_spread, heat)
