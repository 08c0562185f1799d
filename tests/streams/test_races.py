"""Accesses to the same memory by two streams, or by a stream and the host, are always in order."""

from __future__ import annotations

import copy
import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from races import RaceCheck, lasting
from simulated_card import CARD, on_card, simulated_card
from test_late_card import (
    SETTINGS,
    TOKENS,
    copies_that_do_not_wait,
    copies_that_keep_nothing_alive,
    missing_wait,
    one_question,
    reuse_in_turn,
    saved,
    two_questions,
)  # fmt: skip

from tieredkv.memory.pagelock import aligned

pytestmark = [pytest.mark.slow, pytest.mark.interpreter]


def races_of(patch, model, ids, path, **options):
    reuse_in_turn(patch)
    with torch.no_grad(), simulated_card(patch, kind=RaceCheck) as card:
        card.watch(patch)
        path(on_card(copy.deepcopy(model)), ids[:, :TOKENS].to(CARD), **options)
        return sorted(set(card.races))


@pytest.mark.parametrize("path", [one_question, two_questions, saved], ids=lambda path: path.__name__)
@pytest.mark.parametrize("name", ["ranked", "reuse and prefetch", "4 bits"])
def test_everything_is_in_order(one_layer, long_ids, monkeypatch, path, name):
    assert lasting(lambda: races_of(monkeypatch, one_layer, long_ids, path, **SETTINGS[name])) == []


# ---- that it finds them: each fault is planted


@pytest.mark.parametrize(
    ("fault", "path", "name", "what"),
    [
        (missing_wait, one_question, "ranked", "what copy writes"),
        (copies_that_do_not_wait, one_question, "ranked", "copy writes what"),
        (
            copies_that_keep_nothing_alive,
            one_question,
            "reuse and prefetch",
            r"freed memory writes what \[_gather",
        ),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_missing_order_is_found(one_layer, long_ids, monkeypatch, fault, path, name, what):
    fault(monkeypatch)
    races = races_of(monkeypatch, one_layer, long_ids, path, **SETTINGS[name])
    assert any(re.search(what, race) for race in races), races


def test_rows_that_differ_are_no_race(monkeypatch):
    with simulated_card(monkeypatch, kind=RaceCheck) as card:
        x, index = torch.zeros(8, 4, device=CARD), torch.tensor([1, 3], device=CARD)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x[4:, 1:3] = 1
            x[index] = 2
        x[:4, :].index_select(0, index - 1)
        (x[4:, 0] + x[4:, 3]).sum()
        assert card.races == []
        x[3:4].sum()
        assert card.races == [
            "aten.sum.default reads what aten.index_put_.default writes, and nothing puts them in order"
        ]


def test_events_and_waits_put_things_in_order(monkeypatch):
    with simulated_card(monkeypatch, kind=RaceCheck) as card:
        x, side = torch.zeros(8, device=CARD), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)
            done = torch.cuda.Event()
            done.record()
            x.add_(1)
        torch.cuda.current_stream().wait_event(done)
        x.sum()  # ordered after the first addition alone
        assert len(card.races) == 1
        side.synchronize()
        x.mul_(2)  # what the host has seen, it queues later
        assert len(card.races) == 1


def test_memory_of_the_host_that_a_copy_still_reads(monkeypatch):
    with simulated_card(monkeypatch, kind=RaceCheck) as card:
        host = aligned((8,), torch.float32)
        torch.cuda.cudart().cudaHostRegister(host.data_ptr(), 4096, 1)
        x = torch.zeros(8, device=CARD)
        x.copy_(host, non_blocking=True)
        host.fill_(1)
        assert len(card.races) == 1
        torch.cuda.synchronize()
        host.fill_(2)
        assert len(card.races) == 1


def test_a_race_lasts_if_a_second_run_finds_it():
    runs = iter((["a", "b"], ["b", "c"], []))
    assert lasting(lambda: next(runs)) == ["b"]
    assert lasting(lambda: next(runs)) == []
