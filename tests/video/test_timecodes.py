"""Times as people write them, and as messages show them."""

from __future__ import annotations

import pytest

from tieredkv.errors import VideoError
from tieredkv.video.sampling import Sampling
from tieredkv.video.timecodes import seconds, shown, with_seconds


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("90", 90), ("1.5", 1.5), ("1e2", 100), (7, 7), ("1:00", 60), ("0:05.25", 5.25), ("75:10", 4510),
        ("1:02:03.5", 3723.5), (" 1:00 ", 60), ("100:00:00", 360_000),
    ],
)  # fmt: skip
def test_seconds_and_clock_times(text, time):
    assert seconds("start", text) == time


@pytest.mark.parametrize("text", ["1:60", "1:60:00", "1:", ":30", "1:2:3:4", "-1:00", "noon", "", "1:00pm", "1:1e1"])
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(VideoError, match=r"^start='.*' is not valid: give seconds, or a time as in 1:00 or 1:02:03\.5"):
        seconds("start", text)


def test_only_times_given_as_text_are_changed():
    assert with_seconds({"start": "1:00", "end": 90, "fps": "2"}) == {"start": 60, "end": 90, "fps": "2"}


@pytest.mark.parametrize(
    ("time", "text"),
    [(0, "0"), (59.5, "59.5"), (60, "60 (1:00)"), (75.5, "75.5 (1:15.5)"), (3723.25, "3723.25 (1:02:03.25)")],
)
def test_messages_show_both_forms_from_a_minute_on(time, text):
    assert shown(time) == text


def test_an_end_before_the_start_names_the_start_in_both_forms():
    with pytest.raises(VideoError, match=r"end=30.0 is not valid: give seconds after start=60 \(1:00\)"):
        Sampling(start=60, end=30.0)
