"""Times, ticks, columns and labels, which the sheet and the page share."""

from __future__ import annotations

import itertools

import numpy as np
from evidence_examples import evidence
from hypothesis import given
from hypothesis import strategies as st

from tieredkv.evidence import strip


def test_a_span_holds_its_moment_and_has_hours_on_both_sides_or_none():
    (found,) = evidence({4: 1.0}, start=3597.0)
    assert (found.start, found.end) == (3599.0, 3599.5)
    assert strip.span(found, "-") == "0:59:59-1:00:00"


@given(st.floats(0, 1e5), st.floats(0.5, 4e5))
def test_ticks_are_few_and_inside(start, length):
    axis = strip.ticks(start, start + length)
    assert len(axis) <= strip.MOST_TICKS + 1
    assert all(start - 1e-3 <= time <= start + length + 1e-3 for time, _ in axis)
    assert len({text for _, text in axis}) == len(axis)
    assert len(axis) >= 2 or length < 20


@given(st.lists(st.floats(0, 1000), max_size=12), st.floats(5, 200))
def test_labels_are_in_order_inside_and_do_not_overlap(places, width):
    result = strip.spread(places, width, 0, 1000)
    wide = min(width, 1000 / max(1, len(places)))
    centres = sorted(result)
    assert all(after - before >= wide - 1e-6 for before, after in itertools.pairwise(centres))
    assert all(wide / 2 - 1e-6 <= centre <= 1000 - wide / 2 + 1e-6 for centre in result)
    assert [places[i] for i in np.argsort(result, kind="stable")] == sorted(places)


def test_labels_far_apart_stay_at_their_places():
    assert strip.spread([300.0, 700.0], 30, 0, 1000) == [300.0, 700.0]


def test_no_peak_is_lost_however_many_steps_share_a_column():
    heat = strip.columns(evidence({777: 1.0, 5000: 0.5}, steps=7200), 100, least=3)
    assert (max(heat), sorted(set(heat))) == (1.0, [0.0, 0.5, 1.0])
    assert heat.count(1.0) == 3
    assert strip.columns(evidence({}), 10, least=3) == [0.0] * 10
