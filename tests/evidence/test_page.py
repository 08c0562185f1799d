"""The evidence page."""

from __future__ import annotations

import numpy as np
from evidence_examples import ATTACK, evidence
from page_checker import checked
from PIL import Image

from tieredkv.evidence.page import to_html
from tieredkv.evidence.view import View


def pictures(count: int, width: int = 64, height: int = 48) -> list[Image.Image]:
    return [Image.fromarray(np.full((height, width, 3), 20 * i, np.uint8)) for i in range(count)]


def test_a_page_loads_nothing_and_runs_nothing():
    page = checked(to_html(View(ATTACK, ATTACK, evidence({4: 1.0, 30: 0.5}), pictures(2), ATTACK)))
    assert all(value.startswith(("data:image/jpeg;base64,", "#moment-")) for value in page.loads)
    assert page.seen.count("img") == 2
    assert not {"script", "link", "iframe", "object"} & set(page.seen)
    assert ATTACK in "".join(page.words)


def test_a_page_shows_question_answer_times_and_weights():
    page = checked(to_html(View("what ?", "red", evidence({4: 1.0, 30: 0.6}, start=60), pictures(2), "film.mp4")))
    words = " ".join(page.words)
    for text in ("what ?", "red", "1:02", "1:15", "62 %", "38 %", "film.mp4", "1:00 to 1:20"):
        assert text in words


def test_a_page_without_frames_shows_times_and_the_reason():
    page = checked(to_html(View("what ?", "red", evidence({4: 1.0}), None, "")))
    assert "img" not in page.seen
    assert "no frames, as the video was not given" in " ".join(page.words)
    assert "rect" in page.seen


def test_a_page_without_moments_says_so():
    assert "No moment stands out." in to_html(View("what ?", "red", evidence({}), None, ""))
