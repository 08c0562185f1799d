"""Ranks that follow a script: what a prediction copies ahead is what was stated, and it does all of its work."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tieredkv.ops.select import TORCH
from tieredkv.planning.ahead_time import USUAL, ahead_share, foreseen_share
from tieredkv.policy.correction import Correction, rank_of

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from drift import Drift, ranks_by_distance, shares
from synthetic import filled, make_model, sealed, tiers_for

CHUNKS, SELECTED = 2000, 100
LIKELY = SELECTED * USUAL // 100
TOKENS, STEPS, WARM = 2048, 4, 3
WORK = ("chunk_ranks", "choose", "place", "gather")


def likely(shift, foreseen, wasted):
    """Distances of the chunks that a prediction takes, best first."""
    ranks = ranks_by_distance(CHUNKS, SELECTED, shift, foreseen, wasted)
    return ranks.argsort(descending=True)[:LIKELY].tolist()


@pytest.mark.parametrize("shift", [5, 20, 60])
def test_a_prediction_takes_the_stated_share_of_the_missing_chunks(shift):
    kept = SELECTED - shift
    taken = [distance for distance in likely(shift, 0.8, 0.25) if kept <= distance < SELECTED]
    assert taken == list(range(kept, kept + round(0.8 * shift)))


@pytest.mark.parametrize(("shift", "wasted"), [(5, 3), (20, 13), (60, LIKELY - 40 - 48)])
def test_a_prediction_takes_the_stated_share_in_vain_if_it_takes_that_many(shift, wasted):
    behind = CHUNKS - LIKELY  # chosen in one of the last steps, so still there
    assert sum(SELECTED <= distance < behind for distance in likely(shift, 0.8, 0.65)) == wasted


def test_a_prediction_takes_all_that_is_selected_again():
    assert set(range(SELECTED - 20)) < set(likely(20, 0.8, 0.65))


def test_ranks_are_as_far_apart_as_those_of_a_step():
    ranks = ranks_by_distance(CHUNKS, SELECTED, 20, 0.8, 0.65)
    assert sorted(ranks.tolist()) == list(range(1 - CHUNKS, 1))


def test_shares_are_of_what_is_missed_without():
    assert shares(missed=20, copied_ahead=145, without=100) == {"foreseen": 0.8, "wasted": 0.65}
    assert shares(missed=0, copied_ahead=0, without=0) == {"foreseen": None, "wasted": None}


# ---- in steps


@pytest.fixture(scope="module")
def model():
    """Of two layers, the second of which is predicted."""
    with torch.no_grad():
        return make_model("tiny", "cpu", torch.float32)


class Steps:
    """Steps of one filled cache, and what they did."""

    def __init__(self, model):
        self.calls: Counter[str] = Counter()
        self.model, self.drift = model, Drift(replace(TORCH, **{name: self.counted(name) for name in WORK}))
        self.tiers = tiers_for(model, TOKENS, 0.2, ahead=False)

    def counted(self, name):
        def operation(*args):
            self.calls[name] += 1
            return getattr(TORCH, name)(*args)

        return operation

    def __enter__(self):
        self.filled = filled(self.model, TOKENS, self.drift, WARM + STEPS, self.tiers)
        self.cache = self.filled.__enter__()
        return self

    def __exit__(self, *error):
        self.filled.__exit__(*error)

    def take(self, ahead, hit_rate=0.5, **script):
        """Logits, the plan, and bytes missed and copied ahead in a step."""
        cache, tiers = self.cache, replace(self.tiers, ahead=ahead)
        with torch.no_grad(), sealed(cache, self.model, self.drift, tiers, hit_rate, WARM + STEPS, **script) as steps:
            logits = [steps(7).clone() for _ in range(WARM)]
            before = replace(cache.counters)
            logits += [steps(7).clone() for _ in range(STEPS)]
            after, plan = cache.counters, cache.decoding._phases[0].plan
            missed = (after.missed_bytes - before.missed_bytes) / STEPS
            return torch.cat(logits), plan, missed, (after.prefetched_bytes - before.prefetched_bytes) / STEPS


@pytest.fixture(scope="module")
def steps(model):
    with Steps(model) as steps:
        yield steps


def test_what_is_foreseen_and_wasted_comes_out_as_stated(steps):
    _, _, without, none = steps.take(ahead=False, hit_rate=0.8)
    _, plan, missed, ahead = steps.take(ahead=True, hit_rate=0.8, foreseen=0.6, wasted=0.4)
    assert none == 0
    assert plan.selected.unique().tolist() == [46]  # of which 9 are missing: 5 are foreseen, and 4 others copied
    found = shares(missed, ahead, without)  # of both layers
    assert found == {"foreseen": pytest.approx(5 / 18), "wasted": pytest.approx(4 / 18)}


def test_the_plan_is_the_same_with_copies_ahead(steps):
    (_, without, *_), (_, plan, *_) = (steps.take(ahead=ahead) for ahead in (False, True))
    assert torch.equal(plan.selected, without.selected)
    assert torch.equal(plan.slots, without.slots)
    assert plan.page_bits == without.page_bits


def test_a_prediction_does_all_of_its_work(steps, monkeypatch):
    """Its query is corrected, by as many directions as shipped; chunks are ranked, chosen, placed and copied."""
    ranks, corrected = [], Correction.corrected

    def watched(correction, rows, predicted):
        ranks.append(correction.down.shape[1])
        return corrected(correction, rows, predicted)

    monkeypatch.setattr(Correction, "corrected", watched)
    calls = []
    for ahead in (False, True):
        steps.calls.clear()
        steps.take(ahead=ahead)
        calls.append(dict(steps.calls))
    without, with_copies = calls
    assert without == dict.fromkeys(WORK, 2 * (WARM + STEPS))  # of two layers
    assert with_copies == dict.fromkeys(WORK, 3 * (WARM + STEPS))  # one of which is predicted
    assert ranks == [rank_of(256)] * (WARM + STEPS)
    assert steps.drift.predicted == {1}


def test_copies_ahead_by_real_predictions_change_no_logits(steps):
    (without, *_), (logits, _, _, ahead) = (steps.take(ahead=ahead, hit_rate=None) for ahead in (False, True))
    assert ahead > 0
    assert torch.equal(logits, without)


def test_without_shares_the_script_has_those_of_the_planner(steps):
    steps.take(ahead=True)
    assumed = steps.drift.assumed
    per_cent, spare = assumed["ahead_per_cent"], steps.tiers.spare_ratio
    assert assumed["assumed_foreseen"] == foreseen_share(spare, per_cent)
    assert assumed["assumed_foreseen"] + assumed["assumed_wasted"] == pytest.approx(ahead_share(per_cent))
