"""Budgets add up, keep to their limits and follow their weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tieredkv.policy import budget


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=12),
    st.floats(0, 1.2),
    st.integers(1, 400),
    st.integers(0, 30),
    st.integers(1, 3),
    st.floats(0.1, 1),
    st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_budgets_add_up_and_respect_their_limits(values, theta, total, most, least, split, floor):
    scores = torch.tensor([values])
    static = scores >= theta
    n_static, n_dynamic = int(static.sum()), int((~static).sum())
    needed = n_dynamic * min(least, most) + n_static * min(1, most)
    if total < needed:
        with pytest.raises(ValueError, match="cannot serve"):
            budget.split_budget(scores, static, total, most, least, split, floor)
        return
    got = budget.split_budget(scores, static, total, most, least, split, floor)
    check_budget(got, static, total, most, least)
    if total >= most * (n_static + n_dynamic) and split == 1:
        assert (got == most).all()
    assert len(set(got[~static].tolist())) <= 1


def check_budget(got, static, total, most, least):
    """Adds up, and every head has at least its minimum and at most everything."""
    assert int(got.sum()) <= total
    assert int(got.max()) <= most
    assert (got[static] >= min(1, most)).all()
    assert (got[~static] >= min(least, most)).all()


def test_a_less_concentrated_static_head_gets_more():
    scores = torch.tensor([[0.99, 0.91, 0.2]])
    got = budget.split_budget(scores, scores >= 0.9, 90, 1000, 1, 1.0, 0.2)
    assert got[0, 2] == 30
    assert got[0, 1] > got[0, 0] >= 6
    assert int(got.sum()) == 90


@pytest.mark.parametrize(("weight", "more"), [("need", 1), ("score", 0)])
def test_the_weight_decides_which_static_head_gets_more(weight, more):
    scores = torch.tensor([[0.9, 0.5]])
    got = budget.split_budget(scores, scores >= 0, 60, 1000, 1, 1.0, 0.1, weight)
    assert int(got.argmax()) == more
    even = budget.split_budget(scores, scores >= 0, 60, 1000, 1, 1.0, 0.1, "even")
    assert even.tolist() == [[30, 30]]


def test_the_type_split_moves_pages_from_dynamic_to_static_heads():
    scores = torch.tensor([[0.95, 0.1]])
    even = budget.split_budget(scores, scores >= 0.9, 100, 1000, 1, 1.0, 0.2)
    less = budget.split_budget(scores, scores >= 0.9, 100, 1000, 1, 0.5, 0.2)
    assert even.tolist() == [[50, 50]]
    assert less.tolist() == [[75, 25]]


@given(
    st.lists(st.integers(0, 4000), min_size=1, max_size=12),
    st.integers(0, 2000),
    st.integers(1, 400),
    st.integers(0, 30),
    st.integers(1, 3),
    st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_budgets_by_need_add_up_and_respect_their_limits(values, enough, total, most, least, floor):
    need = torch.tensor([values])
    static = need <= enough
    least_total = int((~static).sum()) * min(least, most) + int(static.sum()) * min(1, most)
    if total < least_total:
        with pytest.raises(ValueError, match="cannot serve"):
            budget.by_need(need, need, static, total, most, least, 16, floor)
        return
    got = budget.by_need(need, need, static, total, most, least, 16, floor)
    check_budget(got, static, total, most, least)
    if total >= most * len(values):
        assert (got == most).all()


def test_static_heads_get_what_they_need_and_dynamic_heads_the_rest_by_the_root_of_spread():
    need = torch.tensor([[32, 100, 400]])
    static = torch.tensor([[True, False, False]])
    assert budget.by_need(need, need, static, 92, 1000, 1, 16, 0.0).tolist() == [[2, 30, 60]]
    assert budget.by_need(need, need, static, 92, 1000, 1, 16, 1.0).tolist() == [[2, 45, 45]]
