"""`fit=True` in a session: which rate and size an ingest keeps, and what cannot be chosen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tieredkv.errors import OptionError
from tieredkv.session.checkpoint import Damaged
from tieredkv.session.origin import check_sampling
from tieredkv.session.sampled_video import as_begun, fitting
from tieredkv.video.media import media_of
from tieredkv.video.sampling import Sampling

FIT = Sampling(fit=True, end=60.0)


def checkpoint(sampling: Sampling | None) -> Any:
    begun = SimpleNamespace(video=SimpleNamespace(sampling=sampling))
    return SimpleNamespace(begun=lambda: begun)


def test_an_ingest_that_is_continued_keeps_what_it_chose():
    assert as_begun(FIT, checkpoint(Sampling(fps=0.5, max_pixels=112_896))) == Sampling(
        fps=0.5, max_pixels=112_896, end=60.0
    )


def test_what_is_given_goes_before_what_was_chosen():
    given = Sampling(fit=True, fps=1.0)
    assert as_begun(given, checkpoint(Sampling(fps=0.5, max_pixels=784))) == Sampling(fps=1.0, max_pixels=784)


def test_without_an_earlier_ingest_the_choice_is_open():
    def damaged() -> Any:
        raise Damaged("broken")

    for earlier in (None, SimpleNamespace(begun=lambda: None), SimpleNamespace(begun=damaged), checkpoint(None)):
        assert as_begun(FIT, earlier) == FIT


@pytest.mark.parametrize(
    ("video", "message"), [(["a.mp4", "b.mp4"], "is for one video: give fps"), (iter([]), "would use up the iterator")]
)
def test_several_videos_and_iterators_are_refused(video, message):
    with pytest.raises(OptionError, match=message):
        fitting(media_of(video), None, FIT, lambda source, sampling: None, None, lambda: None, False)


def test_a_saved_session_fits(tmp_path):
    manifest = {"sampling": {"fps": 0.5, "max_pixels": 112_896, "fit": False}}
    check_sampling(tmp_path / "film.tkv", manifest, {"fit": True, "max_pixels": 112_896})
