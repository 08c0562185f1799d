"""Sampling a video file while decoding: spans, seeking to key frames, and iterators that keep nothing alive."""

from __future__ import annotations

import hashlib
import threading
import weakref

import numpy as np
import pytest
from films import noise, numbered, numbers, sample, ticks, write

from tieredkv.errors import VideoError
from tieredkv.video import sampling
from tieredkv.video.frames import open_video
from tieredkv.video.playback import Playback
from tieredkv.video.sampling import Sampling

pytestmark = pytest.mark.files

# ---- start, end, max_frames


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """120 numbered pictures in twelve seconds, with B-frames and a key frame each half second."""
    return write(tmp_path_factory.mktemp("counted") / "counted.mp4", numbered(120), g="5", bf="2")


def test_a_span_is_sampled_from_its_start_to_before_its_end(counted):
    source = open_video(counted, Sampling(2, start=3.0, end=5.0))
    assert (source.expected, source.seconds) == (4, 2.0)
    assert numbers(source.frames()) == [30, 35, 40, 45]


def test_an_end_past_the_video_means_its_end(counted):
    source = open_video(counted, Sampling(1, start=9.5, end=100))
    assert numbers(source.frames()) == [95, 105, 115]
    assert source.expected == 3


def test_a_start_past_the_video_is_an_error_with_its_length(counted):
    with pytest.raises(VideoError, match=r"counted\.mp4: start=12\.5 is past the end of the video, .* 12\.00 s"):
        open_video(counted, Sampling(1, start=12.5))


def test_max_frames_are_spread_over_the_span(counted):
    source = open_video(counted, Sampling(10, start=2, end=10, max_frames=4))
    assert (source.fps, source.expected) == (0.5, 4)
    assert numbers(source.frames()) == [20, 40, 60, 80]


def test_max_frames_above_the_number_of_frames_change_nothing(counted):
    source = open_video(counted, Sampling(1, max_frames=12))
    assert (source.fps, source.expected) == (1, 12)


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ({"start": -1}, r"start=-1 is not valid"),
        ({"start": "0"}, r"start='0' is not valid"),
        ({"start": float("nan")}, r"start=nan is not valid"),
        ({"start": 2, "end": 2}, r"end=2 is not valid: give seconds after start=2"),
        ({"end": True}, r"end=True is not valid"),
    ],
    ids=["negative", "text", "nan", "empty", "bool"],
)
def test_an_invalid_span_is_refused(counted, span, message):
    with pytest.raises(VideoError, match=message):
        open_video(counted, Sampling(1, **span))


# ---- seeking

GROUPS = {
    "closed.mp4": {"g": "10", "bf": "3"},
    "open.mkv": {"x264-params": "open-gop=1:keyint=10:bframes=3"},
    "open.mp4": {"x264-params": "open-gop=1:keyint=10:bframes=3"},
    "refresh.mkv": {"x264-params": "intra-refresh=1:keyint=10"},
    "uneven.mp4": {"keys": (5, 20, 22, 60, 61, 62, 130), "x264-params": "keyint=250:scenecut=0"},
    "mpeg2.mkv": {"codec": "mpeg2video", "rate": 25, "g": "12", "bf": "2"},
    "fragments.mp4": {"g": "10", "flags": {"movflags": "frag_keyframe+empty_moov"}},
}


@pytest.fixture(scope="module", params=GROUPS)
def groups(request, tmp_path_factory):
    """A moving picture in many groups of pictures."""
    base = noise(1)[0]
    moving = [np.roll(base, (i, 2 * i), (0, 1)) for i in range(160)]
    return write(tmp_path_factory.mktemp("groups") / request.param, moving, **GROUPS[request.param])


@pytest.mark.parametrize(
    ("fps", "start", "end"), [(0.9, 0, None), (0.31, 0, None), (0.31, 5.03, None), (0.77, 3.3, 5.9), (7, 0.5, 2)]
)
def test_seeking_gives_the_same_frames_as_linear_decoding(groups, fps, start, end):
    sought, linear = (open_video(groups, Sampling(fps, start=start, end=end)) for _ in range(2))
    linear._seek = False
    sought, linear = list(sought.frames()), list(linear.frames())
    assert np.array_equal(np.stack(sought), np.stack(linear))


@pytest.mark.parametrize("seek", [True, False])
@pytest.mark.parametrize("sampling", [{"fps": 4}, {"fps": 24}, {"fps": 1.5, "start": 2.2, "end": 9}])
def test_frames_from_within_are_those_of_the_whole(sampling, seek, counted):
    source = open_video(counted, Sampling(**sampling))
    source._seek &= seek
    whole = numbers(source.frames())
    for first in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
        assert numbers(source.frames(first=first)) == whole[first:]


def test_frames_from_within_are_sought(counted):
    seen: list[float] = []
    source = open_video(counted, Sampling(10))
    assert len(list(source.frames(seen.append, first=110))) == 10
    assert len(seen) < 40


@pytest.mark.parametrize("options", [{"fps": 0.25}, {"fps": 2, "start": 10, "end": 11}], ids=["sparse", "late start"])
def test_seeking_decodes_fewer_frames(counted, options):
    assert len(ticks(counted, **options)) < 0.5 * len(ticks(counted, seek=False, **options))


def test_formats_without_an_index_are_decoded_completely(whole):
    assert len(ticks(whole["cut.ts"], fps=0.25)) == 200


def test_an_index_that_leads_past_the_requested_time_is_not_used(counted, monkeypatch):
    """Every seek lands too late: decoding starts again from the beginning, and gives no frame twice."""
    enter_at = Playback._enter_at
    monkeypatch.setattr(Playback, "_enter_at", lambda self, time: enter_at(self, time + 100))
    assert numbers(sample(counted, 0.25)) == [0, 40, 80]


# ---- iteration


def test_each_decoded_frame_ticks_with_the_seconds_so_far(counted):
    seen = ticks(counted, fps=10)
    assert seen == pytest.approx([i / 10 for i in range(120)])


def test_ticks_count_from_the_start_of_the_span(counted):
    seen = ticks(counted, fps=2, start=6, end=8)
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, pytest.approx(1.6, abs=0.11))


class _StopHere(Exception):
    pass


def closes(monkeypatch) -> list[bool]:
    """A list that gets one entry for each closed container."""
    closed, opened = [], sampling.opened

    class Counting:
        def __init__(self, path, stream):
            self.context = opened(path, stream)

        def __enter__(self):
            return self.context.__enter__()

        def __exit__(self, *error):
            self.context.__exit__(*error)
            closed.append(True)

    monkeypatch.setattr(sampling, "opened", Counting)
    return closed


def test_a_tick_that_raises_stops_decoding_and_closes_the_file(counted, monkeypatch):
    closed = closes(monkeypatch)
    given = []

    def stop(seconds: float) -> None:
        if seconds > 2:
            raise _StopHere

    with pytest.raises(_StopHere):
        given.extend(open_video(counted, Sampling(10)).frames(stop))
    assert numbers(given) == list(range(20))
    assert closed == [True]


def test_an_iterator_that_is_closed_closes_the_file(counted, monkeypatch):
    closed = closes(monkeypatch)
    frames = open_video(counted, Sampling(10)).frames()
    next(frames)
    assert closed == []
    frames.close()
    assert closed == [True]


def test_several_iterators_may_run_at_once(counted):
    source = open_video(counted, Sampling(1))
    first, second = source.frames(), source.frames()
    both = [(next(first), next(second)) for _ in range(source.expected)]
    assert all(np.array_equal(one, other) for one, other in both)


def test_frames_may_be_decoded_on_another_thread(counted):
    source, given = open_video(counted, Sampling(1)), []
    thread = threading.Thread(target=lambda: given.extend(source.frames()))
    thread.start()
    thread.join()
    assert numbers(given) == list(range(0, 120, 10))


def test_frames_are_not_kept_alive(counted):
    """Of 120 frames, only the last is still in memory if the caller keeps none."""
    pictures = [weakref.ref(picture) for picture in open_video(counted, Sampling(10)).frames()]
    assert len(pictures) == 120
    assert sum(picture() is not None for picture in pictures) <= 1


def test_the_hash_of_a_file_is_that_of_its_bytes(counted):
    assert open_video(counted, Sampling(1)).sha256() == hashlib.sha256(counted.read_bytes()).hexdigest()
