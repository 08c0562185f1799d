"""Frames of moments."""

from __future__ import annotations

import numpy as np
import pytest
from evidence_examples import evidence
from films import numbered, numbers, with_sound, write
from PIL import Image

from tieredkv.evidence.view import moment_frames, scaled


def test_frames_are_those_of_the_moments_peaks(tmp_path):
    film = write(tmp_path / "film.mp4", numbered(40), bf="0", g="10")  # ten a second
    shown = evidence({4: 1.0, 7: 0.5}, steps=8, start=0.0)
    assert [moment.peak for moment in shown] == [2.25, 3.75]
    assert numbers(np.asarray(frame) for frame in moment_frames(shown, film)) == [22, 37]
    frames = list(np.stack(numbered(40)))
    assert numbers(np.asarray(frame) for frame in moment_frames(shown, frames, source_fps=10)) == [22, 37]


def test_frames_of_a_picture_that_begins_late_are_found_by_the_files_clock(tmp_path):
    film = with_sound(tmp_path / "film.mp4", numbered(40), begin=5, rate=10)
    shown = evidence({4: 1.0, 7: 0.5}, steps=8, start=5.0)
    assert [moment.peak for moment in shown] == [7.25, 8.75]
    assert numbers(np.asarray(frame) for frame in moment_frames(shown, film)) == [22, 37]


@pytest.mark.parametrize("size", [(28, 28), (3840, 2160), (1080, 1920), (2000, 20)])
def test_a_frame_of_any_size_is_fitted(size):
    fitted = scaled(Image.new("RGB", size), 400, 300)
    assert fitted.width <= 400
    assert fitted.height <= 300
    assert fitted.width == 400 or fitted.height == 300
