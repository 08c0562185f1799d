"""Copies for predicted queries on a simulated card: in order, whenever they happen, and the same answers to the bit."""

from __future__ import annotations

import copy
import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from races import RaceCheck, lasting
from simulated_card import CARD, on_card, simulated_card
from test_late_card import ORDERS, TOKENS, copies_that_do_not_wait, missing_wait, one_question, two_questions

from tieredkv.cache.fetching import FetchAhead
from tieredkv.cache.retrieval import Retrieval

pytestmark = [pytest.mark.slow, pytest.mark.interpreter]
RANKED = {"theta": 2.0}


def on_a_card(patch, model, ids, path, order, **options):
    with torch.no_grad(), simulated_card(patch, order):
        return path(on_card(copy.deepcopy(model)), ids[:, :TOKENS].to(CARD), **RANKED, **options)


@pytest.fixture(scope="module")
def plain():
    """Without predictions, on a card that does everything at once, by path."""
    return {}


def check(patch, model, ids, path, order, plain):
    if path not in plain:
        plain[path] = on_a_card(patch, model, ids, path, "at once", ahead=False)
    got = on_a_card(patch, model, ids, path, order, ahead=True)
    for row, want in zip(got, plain[path], strict=True):
        if row.dtype != torch.int64:
            assert torch.equal(row, want)
    return got[-1]


@pytest.mark.parametrize("order", ORDERS)
def test_answers_are_those_without(two_layers, long_ids, monkeypatch, plain, order):
    missed, ahead = check(monkeypatch, two_layers, long_ids, one_question, order, plain).tolist()
    assert ahead > 0
    assert missed < int(plain[one_question][-1][0])


@pytest.mark.parametrize("order", ORDERS[:2])
def test_several_turns(two_layers, long_ids, monkeypatch, plain, order):
    check(monkeypatch, two_layers, long_ids, two_questions, order, plain)


def races_of(patch, model, ids):
    with torch.no_grad(), simulated_card(patch, kind=RaceCheck) as card:
        card.watch(patch)
        one_question(on_card(copy.deepcopy(model)), ids[:, :TOKENS].to(CARD), **RANKED, ahead=True)
        return sorted(set(card.races))


def test_everything_is_in_order(two_layers, long_ids, monkeypatch):
    assert lasting(lambda: races_of(monkeypatch, two_layers, long_ids)) == []


# ---- that they show it: each fault is planted


def no_wait_before_choosing(patch):
    patch.setattr(FetchAhead, "wait", lambda ahead: ahead._prefetcher._pending.pop(ahead._key, None))


def slots_given_away_while_in_use(patch):
    """A prediction that comes between a layer's choice and its attention takes the slots of chunks just chosen."""
    step, foresee = Retrieval.step, Retrieval.foresee

    def again(retrieval, query, scaling, logits=None):
        step(retrieval, query, scaling, logits)
        if retrieval.foresees:
            foresee(retrieval, lambda: -query, scaling)

    def later(retrieval, query, scaling):
        retrieval._ahead.wait()
        foresee(retrieval, query, scaling)

    patch.setattr(Retrieval, "step", again)
    patch.setattr(Retrieval, "foresee", later)


@pytest.mark.parametrize(
    ("fault", "order"),
    [(copies_that_do_not_wait, "copies first"), (missing_wait, "late"),
     (slots_given_away_while_in_use, "copies first")],
    ids=lambda each: getattr(each, "__name__", each),
)  # fmt: skip
def test_a_fault_shows(two_layers, long_ids, monkeypatch, plain, fault, order):
    if one_question not in plain:
        plain[one_question] = on_a_card(monkeypatch, two_layers, long_ids, one_question, "at once", ahead=False)
    fault(monkeypatch)
    with pytest.raises((AssertionError, torch.linalg.LinAlgError)):
        check(monkeypatch, two_layers, long_ids, one_question, order, plain)


@pytest.mark.parametrize(
    ("fault", "what"),
    [(no_wait_before_choosing, r"\[_choose.*\[_gather|\[_gather.*\[_choose"),
     (slots_given_away_while_in_use, r"\[_attend.*\[_gather|\[_gather.*\[_attend")],
    ids=lambda each: getattr(each, "__name__", ""),
)  # fmt: skip
def test_a_missing_order_is_found(two_layers, long_ids, monkeypatch, fault, what):
    fault(monkeypatch)
    races = races_of(monkeypatch, two_layers, long_ids)
    assert any(re.search(what, race) for race in races), races
