"""A cache copies ahead where its plan says so, whatever the settings leave open."""

from __future__ import annotations

import helpers
import pytest
import torch
from helpers import pressed, random_text_model

from tieredkv.cache.device_tier import DeviceTier
from tieredkv.cache.foresight import Foresight
from tieredkv.planning.ahead_time import Lead, Waits
from tieredkv.planning.rates import Rates
from tieredkv.planning.weight_bytes import Weights

LONG = Lead(weight_bytes=1e12, query_bytes=1000, correction_bytes=100)
"""An MLP so slow that every copy is over."""


@pytest.fixture
def decoded(llama, long_ids):
    return lambda **options: helpers.decoded(llama, long_ids, 3, **options)


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


@pytest.mark.parametrize("kind", ["llama", "qwen3_5_text", "gemma3_text", "lfm2", "gemma4_text", "phi3"])
def test_the_planner_knows_which_layers_are_predicted(kind, long_ids, monkeypatch):
    model, predicted = random_text_model(kind), set()
    foresee = Foresight.foresee

    def watched(foresight, layer, sight):
        predicted.add(layer)
        foresee(foresight, layer, sight)

    monkeypatch.setattr(Foresight, "foresee", watched)
    helpers.decoded(model, long_ids, 3, **pressed(model, 600, 0.9), ahead=True)
    leads = Weights.of(model.config, torch.float32).leads()
    assert predicted == {index for index, lead in enumerate(leads) if lead is not None}
