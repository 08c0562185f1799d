"""Steps whose ranks and predictions follow a script (`benchmarks/drift.py`), on a simulated card and in its graph."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from races import RaceCheck
from simulated_card import CARD, on_card, simulated_card

from tieredkv import TierConfig
from tieredkv.ops.select import ops_for

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import synthetic
from drift import Drift, shares
from synthetic import WARM, filled, make_model, sealed

pytestmark = [pytest.mark.slow, pytest.mark.interpreter]
TOKENS, STEPS, HITS = 1024, 3, 0.5
TIERS = TierConfig(gpu_kv_gb=0.5, budget_ratio=0.1, ahead=False)


@pytest.fixture(autouse=True)
def numbers_without_a_driver(monkeypatch):
    """A generator of random numbers on a card needs one."""

    def keys_and_values(model, tokens, layer):
        head_dim = model.config.hidden_size // model.config.num_attention_heads
        shape = model.config.num_key_value_heads, tokens, head_dim
        return tuple(torch.randn(shape, device="cpu").to(CARD) for _ in range(2))

    monkeypatch.setattr(synthetic, "keys_and_values", keys_and_values)


@pytest.fixture(scope="module")
def narrow():
    """Of two layers, the second of which is predicted."""
    return make_model("tiny", "cpu", torch.float32, hidden_size=64, intermediate_size=64, num_attention_heads=4)


def copied(cache, model, drift, ahead):
    """How the last step ran, and the bytes that steps missed and that were copied ahead."""
    with sealed(cache, model, drift, replace(TIERS, ahead=ahead), HITS, WARM + STEPS) as steps:
        for _ in range(WARM):
            steps(7)
        before = replace(cache.counters)
        for _ in range(STEPS):
            steps(7)
        after = cache.counters
        return steps.path, after.missed_bytes - before.missed_bytes, after.prefetched_bytes - before.prefetched_bytes


def test_a_replayed_step_foresees_what_the_script_says(narrow, monkeypatch):
    with torch.no_grad(), simulated_card(monkeypatch):
        model, drift = on_card(copy.deepcopy(narrow)), Drift(ops_for(CARD))
        with filled(model, TOKENS, drift, WARM + STEPS, TIERS) as cache:
            path, without, _ = copied(cache, model, drift, ahead=False)
            also, missed, ahead = copied(cache, model, drift, ahead=True)
    assert path == also == "graph"
    # Of 14 chunks 7 are missing, of which 6 are foreseen, in one layer of two; and of 15 likely ones 2 are left over.
    assert shares(missed, ahead, without) == {"foreseen": pytest.approx(6 / 14), "wasted": pytest.approx(2 / 14)}


def test_the_script_is_read_and_advanced_in_order(narrow, monkeypatch):
    with torch.no_grad(), simulated_card(monkeypatch, kind=RaceCheck) as card:
        card.watch(monkeypatch)
        model, drift = on_card(copy.deepcopy(narrow)), Drift(ops_for(CARD))
        with filled(model, TOKENS, drift, WARM + STEPS, TIERS) as cache:
            copied(cache, model, drift, ahead=True)
        assert drift.predicted
        assert sorted(set(card.races)) == []
