"""What a session knows about its video, and what older files say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tieredkv.models.families.base import Slices, VideoGrid
from tieredkv.session.ingested_video import IngestedVideo, Medium, VideoFacts
from tieredkv.session.results import IngestStats
from tieredkv.session.session_file import SessionState

FACTS = VideoFacts(name="film.mp4", sha256="ab", fps=2.0, start=1.5, seconds=9.9)
VIDEO = IngestedVideo(
    grid=VideoGrid(3, 1, 2, 1.0, between=((), (7,), (8, 9))),
    positions="stock",
    head="look: ",
    head_ids=(3, 4, 5),
    facts=FACTS,
    ingest_s=2.0,
    stats=IngestStats(20, 6, 1.0, 1.0, 1.0, 1.5, 0),
)
STATE = SessionState(VIDEO, [("what ?", "that")])


def plain() -> dict:
    return json.loads(json.dumps(STATE.as_plain()))


@pytest.mark.parametrize(
    ("frames", "seconds", "end"), [(10, None, 6.5), (10, 9.9, 6.5), (20, 9.9, 11.4)], ids=["unknown", "before", "cut"]
)
def test_the_last_frame_ends_with_the_span_at_the_latest(frames, seconds, end):
    assert replace(FACTS, seconds=seconds).end(frames) == pytest.approx(end)


def test_its_tokens_are_the_head_and_the_video():
    assert VIDEO.tokens == len(VIDEO.ids([0])) == len(VIDEO.is_visual()) == 12
    assert VIDEO.ids([0]) == [3, 4, 5, 0, 0, 7, 0, 0, 8, 9, 0, 0]
    assert [token == 0 for token in VIDEO.ids([0])] == VIDEO.is_visual().tolist()


def test_steps_may_differ_in_length():
    video = replace(VIDEO, grid=replace(VIDEO.grid, lengths=(2, 1, 2)))
    assert video.ids([0]) == [3, 4, 5, 0, 0, 7, 0, 8, 9, 0, 0]
    assert [token == 0 for token in video.ids([0])] == video.is_visual().tolist()
    assert video.grid.step_of(torch.arange(video.grid.tokens)).tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    state = SessionState(video, [])
    assert SessionState.of(json.loads(json.dumps(state.as_plain())), first_picture=5.0, sampling=None) == state


@pytest.mark.parametrize(("frames", "times"), [(5, [3.5]), (6, [3.5, 4.0])])
def test_the_last_step_may_be_incomplete(frames, times):
    assert replace(VIDEO, stats=replace(VIDEO.stats, frames=frames)).last.last_times == times


def test_what_is_written_is_read_back():
    assert SessionState.of(plain(), first_picture=5.0, sampling=None) == STATE
    tiled = replace(VIDEO, grid=replace(VIDEO.grid, slices=Slices(1, 2, 3, 4, ((5,), (6, 7)))))
    written = json.loads(json.dumps(SessionState(tiled, []).as_plain()))
    assert SessionState.of(written, first_picture=5.0, sampling=None).video == tiled


@pytest.mark.parametrize(
    ("absent", "start"), [(("clock",), 6.5), (("clock", "start"), 5.0), (("start",), 0.0)], ids=str
)
def test_an_older_file_counts_from_the_first_picture(absent, start):
    older = plain()
    for name in absent:
        del older["video"][name]
    assert SessionState.of(older, first_picture=5.0, sampling=None).video.facts == replace(FACTS, start=start)


MORE = Medium("image", (6,), VideoGrid(1, 2, 2, 1.0), replace(FACTS, name="map.png"), 1, ((2.0, 3.0),), 7)
BOTH = replace(VIDEO, more=(MORE,), stats=replace(VIDEO.stats, frames=21, damaged=((1.0, 1.5), (2.0, 3.0))))


def test_several_follow_one_another():
    assert BOTH.tokens == 17
    assert BOTH.ids([0, 1]) == [3, 4, 5, 0, 0, 7, 0, 0, 8, 9, 0, 0, 6, 1, 1, 1, 1]
    assert [token in (0, 1) for token in BOTH.ids([0, 1])] == BOTH.is_visual().tolist()
    assert [medium.frames for medium in BOTH.media] == [20, 1]
    assert [medium.damaged for medium in BOTH.media] == [((1.0, 1.5),), ((2.0, 3.0),)]
    assert [medium.span for medium in BOTH.media] == [(1.5, 11.4), (0.0, 0.0)]
    assert BOTH.last == MORE


def test_several_are_read_back():
    written = json.loads(json.dumps(SessionState(BOTH, []).as_plain()))
    assert SessionState.of(written, first_picture=5.0, sampling=None).video == BOTH
