"""The contact sheet."""

from __future__ import annotations

import pytest
from evidence_examples import evidence
from PIL import Image

from tieredkv.evidence.sheet import draw
from tieredkv.evidence.view import View


@pytest.mark.parametrize("size", [(28, 28), (1920, 1080), (1080, 1920), (2000, 20), (20, 2000)])
@pytest.mark.parametrize("count", [0, 1, 3, 12])
def test_a_sheet_holds_every_moment_in_any_shape(size, count):
    shown = evidence({3 * i: 1.0 for i in range(count)})
    frames = [Image.new("RGB", size, (0, 200 + i, 0)) for i in range(count)]
    sheet = draw(View("what ?", "red", shown, frames, "film.mp4"))
    assert sheet.width == 1600
    assert sheet.height < 4000
    seen = {colour for _, colour in sheet.getcolors(10**7)}
    assert {(0, 200 + i, 0) for i in range(count)} <= seen


def test_a_long_question_is_cut_and_a_long_word_broken():
    def tall(question, answer):
        return draw(View(question, answer, evidence({4: 1.0}), None, "")).height

    assert tall("why " * 2000, "no " * 2000) == tall("why " * 3000, "n" * 9000)
