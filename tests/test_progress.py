"""Times as players show them."""

from __future__ import annotations

import pytest

from tieredkv.progress import timecode


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.99, "0:59"), (60, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (9e4, "25:00:00")],
)
def test_seconds_are_shown_as_a_clock_shows_them(seconds, text):
    assert timecode(seconds) == text


def test_hours_are_shown_where_asked_for():
    assert timecode(61, hours=True) == "0:01:01"
