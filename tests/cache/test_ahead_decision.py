"""A cache copies ahead where its plan says so, whatever the settings leave open."""

from __future__ import annotations

import pytest
import torch
from helpers import LateCopies, pressed, tier_options

import tieredkv
from tieredkv.cache.device_tier import DeviceTier
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.planning.ahead_time import Lead, Waits
from tieredkv.planning.rates import Rates

LONG = Lead(weight_bytes=1e12, query_bytes=1000, correction_bytes=100)
"""An MLP so slow that every copy is over."""


@pytest.fixture
def decoded(llama, long_ids):
    """Logits of three steps, the plan, and the bytes copied ahead."""

    def decode(**options):
        tiers = {**pressed(llama, 600, 0.5), "chunk_tokens": 8, "text_window": 16, "theta": 2.0, **options}
        with (
            torch.no_grad(),
            tieredkv.use_attention(llama),
            TieredCache(llama.config, **tier_options(**tiers), copies=LateCopies()) as cache,
        ):
            llama(long_ids[:, :500], **cache_argument(cache))
            cache.seal()
            steps = [llama(long_ids[:, place : place + 1], **cache_argument(cache)).logits for place in range(3)]
            plan = cache.decoding._phases[0].plan
            cache.finish()
            return torch.cat(steps), plan, cache.counters.prefetched_bytes

    return decode


def test_the_plan_decides_what_is_copied(decoded, monkeypatch):
    slow = Waits(float("inf"), Rates.of(1000, 0.001), (None, LONG, LONG))
    monkeypatch.setattr(DeviceTier, "waits", lambda tier, layers: slow)
    logits, plan, copied = decoded()
    assert (plan.ahead, plan.why_ahead, copied > 0) == (True, "shorter", True)
    assert torch.equal(logits, decoded(ahead=False)[0])
    monkeypatch.setattr(DeviceTier, "waits", lambda tier, layers: Waits(float("inf"), Rates.of(1000, 1e9), slow.leads))
    again, plan, copied = decoded()
    assert (plan.ahead, plan.why_ahead, copied) == (False, "longer", 0)
    assert torch.equal(logits, again)


@pytest.mark.parametrize("options", [{}, {"link_gb_s": 0.01}, {"link_gb_s": 0.01, "budget_ratio": None}], ids=str)
def test_on_a_cpu_nothing_is_copied_ahead_unless_asked_for(decoded, options):
    _, plan, copied = decoded(**options)
    assert (plan.ahead, plan.why_ahead, copied) == (False, "unknown", 0)
    _, plan, copied = decoded(**options, ahead=True)
    assert (plan.ahead, copied > 0) == (True, True)
