"""Progress at a terminal and in a log, and times as players show them."""

from __future__ import annotations

import pytest

from tieredkv import progress
from tieredkv.progress import IngestProgress, TokenCount, note, progress_bar, timecode


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.99, "0:59"), (60, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (9e4, "25:00:00")],
)
def test_seconds_are_shown_as_a_clock_shows_them(seconds, text):
    assert timecode(seconds) == text


def test_hours_are_shown_where_asked_for():
    assert timecode(61, hours=True) == "0:01:01"


@pytest.fixture(params=[True, False], ids=["terminal", "log"])
def terminal(request, monkeypatch):
    monkeypatch.setattr(progress, "at_terminal", lambda: request.param)
    return request.param


def test_a_log_gets_whole_lines_and_no_bars(terminal, capsys):
    with progress_bar("save", "B") as move:
        move(1_000, 2_000)
        move(2_000, 2_000)
    err = capsys.readouterr().err
    assert ("\r" in err) == terminal
    assert ("100%" in err) == terminal
    assert terminal or err == "save: 2.00kB\n"


def test_a_log_says_now_and_then_how_far_an_ingest_is(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN", 0.0)
    bar = IngestProgress(True, 2_000, 90.0)
    bar.decoded(61)
    bar.encoded(1_500)
    bar.prefilled(1_000)
    bar.close(complete=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "ingest: 1,000 of 2,000 tokens, decoded 1:01 of 1:30, encoded 1,500"
    assert len(lines) == 2


def test_what_takes_its_time_is_said_to_who_watches(terminal, capsys):
    note("loading tiny")
    count = TokenCount()
    count.add()
    count.close()
    err = capsys.readouterr().err
    assert err.startswith("loading tiny\n\ranswer: ") if terminal else err == ""


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_reported_also_where_no_bar_is_shown(shown, capsys):
    seen = []
    bar = IngestProgress(shown, 100, None, lambda done, total: seen.append((done, total)))
    bar.resumed(30, 5.0)
    bar.prefilled(40)
    bar.prefilled(30)
    bar.close(complete=True)
    assert seen == [(30, 100), (70, 100), (100, 100)]
