"""Predicted queries in a captured step: the second stream is forked and joined within the graph, and nothing shows."""

from __future__ import annotations

import copy
import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from queues import Queues, Stream
from races import RaceCheck
from simulated_card import CARD, on_card, simulated_card
from test_capture import answer
from test_foreseen_on_a_card import slots_given_away_while_in_use
from test_late_card import TOKENS, copies_that_keep_nothing_alive
from transformers.models.llama.modeling_llama import LlamaMLP

from tieredkv.cache.fetching import FetchAhead
from tieredkv.cache.looks import Looks
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.memory.copies import StreamCopies
from tieredkv.session import step_graph

pytestmark = [pytest.mark.slow, pytest.mark.interpreter]
EAGER = "eager: asked for"
RANKED = {"budget_ratio": 0.5}
SETTINGS = {"ranked": RANKED, "adaptive, 4 bits": {**RANKED, "adaptive": True, "host_kv_bits": 4}}


@pytest.fixture(autouse=True)
def no_earlier_captures(monkeypatch):
    monkeypatch.setattr(step_graph, "_captures", {})


def answered(patch, model, ids, order="at once", kind=None, steps=4, **options):
    """An `answer` on a card, and the card's races if `kind` finds them. With evidence."""
    looks = Looks(8)
    with torch.no_grad(), simulated_card(patch, order, **({} if kind is None else {"kind": kind})) as card:
        if kind is not None:
            card.watch(patch)
        rows, path, counts = answer(
            on_card(copy.deepcopy(model)),
            ids[:, :TOKENS].to(CARD),
            4,
            looks=looks,
            **{**RANKED, "ahead": True, **options},
        )
    return rows, torch.stack(looks.steps), path, counts, sorted(set(getattr(card, "races", [])))


@pytest.fixture(scope="module")
def eager():
    """Answers of eager steps on a card that does everything at once: with predictions and without, by setting."""
    return {}


def expected(patch, model, ids, name, eager):
    if name not in eager:
        eager[name] = [
            answered(patch, model, ids, path=EAGER, ahead=ahead, **SETTINGS[name]) for ahead in (True, False)
        ]
    return eager[name]


@pytest.mark.parametrize(
    ("name", "order"),
    [*(("ranked", order) for order in ("late", "copies first", *range(3))), ("adaptive, 4 bits", "late")],
)
def test_replayed_answers_are_those_without_predictions(three_layers, long_ids, monkeypatch, eager, name, order):
    with_eager, without = expected(monkeypatch, three_layers, long_ids, name, eager)
    rows, looks, path, counts, _ = answered(monkeypatch, three_layers, long_ids, order, **SETTINGS[name])
    assert path == "graph"
    for want in (with_eager, without):
        assert torch.equal(rows, want[0])
        assert torch.equal(looks, want[1])
    assert counts == with_eager[3]
    length, selected, missed, ahead = counts
    assert ahead > 0 == without[3][3]
    assert (length, selected) == without[3][:2]
    assert missed < without[3][2]


def test_every_layer_joins_what_was_forked_for_it(three_layers, long_ids, monkeypatch):
    """`finish`, at the end of a capture, finds nothing to join."""
    left, finish = [], TieredCache.finish

    def seen(cache):
        left.append(list(cache.device_tier.copies._pending))
        finish(cache)

    monkeypatch.setattr(TieredCache, "finish", seen)
    forks = []
    submit = StreamCopies.submit
    monkeypatch.setattr(
        StreamCopies, "submit", lambda copies, key, copy: (forks.append(key), submit(copies, key, copy))
    )
    assert answered(monkeypatch, three_layers, long_ids, steps=2)[2] == "graph"
    assert left == [[], []]
    assert forks.count(1) == forks.count(2) == 2, "one in the eager step and one in the captured"


def fail_in_mlp(patch, layer):
    """In the captured step, the second."""
    forward, calls = LlamaMLP.forward, []

    def failing(mlp, x):
        calls.append(x.shape[1])
        if calls.count(1) == 3 + 1 + layer:  # each step runs three
            raise RuntimeError("CUDA error: operation not permitted\nmore")
        return forward(mlp, x)

    patch.setattr(LlamaMLP, "forward", failing)


@pytest.mark.parametrize("layer", [0, 1, 2], ids=["first fork open", "second fork open", "nothing open"])
def test_after_a_failed_capture_steps_run_eagerly(three_layers, long_ids, monkeypatch, eager, layer):
    """Wherever it fails: while copies are under way on the second stream, too."""
    want, _ = expected(monkeypatch, three_layers, long_ids, "ranked", eager)
    with monkeypatch.context() as patch:
        fail_in_mlp(patch, layer)
        rows, looks, path, counts, _ = answered(patch, three_layers, long_ids, "late")
    assert path == "eager: CUDA error: operation not permitted"
    assert torch.equal(rows, want[0])
    assert torch.equal(looks, want[1])
    assert counts == want[3]


def test_everything_is_in_order(three_layers, long_ids, monkeypatch):
    """Within a replay, from one to the next, and with what reads evidence between."""
    _, _, path, _, races = answered(monkeypatch, three_layers, long_ids, kind=RaceCheck)
    assert path == "graph"
    assert races == []


# ---- that they show it: each fault is planted, in captured steps alone where it says so


def captured_alone(patch, kind, name, fault):
    """Let `kind.name` be `fault(method, *arguments)` while a graph is captured."""
    method = getattr(kind, name)

    def either(self, *args):
        return fault(method, self, *args) if Queues.now.capturing is not None else method(self, *args)

    patch.setattr(kind, name, either)


def no_wait_before_choosing(patch):
    """Copies are joined at the end of the capture, and by nothing before."""
    captured_alone(patch, FetchAhead, "wait", lambda wait, ahead: None)


def no_join(patch):
    captured_alone(patch, StreamCopies, "wait", lambda wait, copies, key: copies._pending.pop(key, (0, 0))[1])


def no_fork(patch):
    captured_alone(patch, Stream, "wait_stream", lambda wait, stream, other: None)


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (no_join, "capturing stream has unjoined work"),
        (no_fork, "dependency created on uncaptured work in another stream"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_fork_that_is_not_joined_is_refused(three_layers, long_ids, monkeypatch, fault, what):
    fault(monkeypatch)
    assert answered(monkeypatch, three_layers, long_ids, "late", steps=2)[2] == f"eager: CUDA error: {what}"


@pytest.mark.parametrize(
    ("fault", "order"), [(no_wait_before_choosing, "late"), (slots_given_away_while_in_use, "copies first")],
    ids=lambda each: getattr(each, "__name__", each),
)  # fmt: skip
def test_a_fault_shows(three_layers, long_ids, monkeypatch, eager, fault, order):
    want, _ = expected(monkeypatch, three_layers, long_ids, "ranked", eager)
    fault(monkeypatch)
    rows, _, path, counts, _ = answered(monkeypatch, three_layers, long_ids, order)
    assert path == "graph"
    assert not torch.equal(rows, want[0]) or counts != want[3]


@pytest.mark.parametrize(
    ("fault", "what"),
    [(no_wait_before_choosing, r"\[_choose.*\[_gather|\[_gather.*\[_choose"),
     (slots_given_away_while_in_use, r"\[_attend.*\[_gather|\[_gather.*\[_attend"),
     (copies_that_keep_nothing_alive, r"freed memory writes what")],
    ids=lambda each: getattr(each, "__name__", ""),
)  # fmt: skip
def test_a_missing_order_is_found(three_layers, long_ids, monkeypatch, fault, what):
    fault(monkeypatch)
    _, _, path, _, races = answered(monkeypatch, three_layers, long_ids, kind=RaceCheck)
    assert path == "graph"
    assert any(re.search(what, race) for race in races), races
