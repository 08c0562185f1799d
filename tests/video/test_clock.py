"""The times of a file's frames: presentation times, or decoding times where no others are stored."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
from films import numbered, numbers, sample, write

from tieredkv.video.clock import Clock
from tieredkv.video.frames import open_video
from tieredkv.video.length import Times
from tieredkv.video.sampling import Sampling

pytestmark = pytest.mark.files

B_FRAMES = {"bf": "3", "x264-params": "b-adapt=0:keyint=30"}
MPEG4 = {"codec": "mpeg4", "bf": "2", "g": "12", "qmin": "1", "qmax": "2"}


@pytest.mark.parametrize("rate", [Fraction(1, 5), 1, 10], ids=["time lapse", "1 per second", "10 per second"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("v.avi", B_FRAMES), ("v.avi", MPEG4), ("v.avi", {"codec": "mjpeg", "pixels": "yuvj420p"}), ("v.asf", B_FRAMES)],
    ids=["avi x264", "avi mpeg4", "avi mjpeg", "asf x264"],
)
def test_formats_without_presentation_times_give_each_picture_once_and_in_order(tmp_path, name, options, rate):
    path = write(tmp_path / name, numbered(60), rate=rate, **options)
    assert numbers(sample(path, float(rate))) == list(range(60))


def test_a_span_of_such_a_file_begins_at_its_start(tmp_path):
    path = write(tmp_path / "v.avi", numbered(60), **B_FRAMES)
    assert numbers(sample(path, 10, start=2, end=3)) == list(range(20, 30))
    assert numbers(sample(path, 10, max_frames=6)) == [0, 10, 20, 30, 40, 50]


def test_b_frames_may_begin_late_in_such_a_file(tmp_path):
    """After a dozen key frames, which come in order."""
    path = write(tmp_path / "v.avi", numbered(60), keys=tuple(range(12)), **B_FRAMES)
    assert numbers(sample(path, 10)) == list(range(60))


@pytest.mark.parametrize("missing", [1, 3, 15, 40])
def test_pictures_may_be_missing_after_the_first_of_such_a_file(tmp_path, missing):
    """Capture programs leave pictures out; empty packets replace them."""
    whole, path = write(tmp_path / "whole.avi", numbered(60), **MPEG4), tmp_path / "v.avi"
    with av.open(str(whole)) as original, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(original.streams.video[0])
        packets = [packet for packet in original.demux(original.streams.video[0]) if packet.size]
        for index, packet in enumerate(packets):
            packet.pts = packet.dts = index + (missing if index else 0)
            packet.time_base, packet.stream = Fraction(1, 10), stream
            output.mux(packet)
    want = [0] * (missing + 1) + list(range(1, 60))
    assert numbers(sample(path, 10)) == want
    assert numbers(sample(path, 10, start=5, end=6)) == want[50:60]


def test_an_mp4_without_presentation_times_is_read_in_order(tmp_path):
    path = write(tmp_path / "v.mp4", numbered(60), **B_FRAMES)
    path.write_bytes(path.read_bytes().replace(b"ctts", b"free").replace(b"edts", b"free"))
    assert numbers(sample(path, 10)) == list(range(60))


@pytest.mark.parametrize("name", ["v.mkv", "v.mp4", "v.ts", "v.flv"])
def test_stored_presentation_times_are_used(tmp_path, name):
    source = open_video(write(tmp_path / name, numbered(60), **B_FRAMES), Sampling(10))
    assert source._film.times.delay is None
    assert numbers(source.frames()) == list(range(60))


def frame(time: float, decoding: float | None) -> SimpleNamespace:
    unit = Fraction(1, 1000)
    dts = None if decoding is None else round(decoding * 1000)
    return SimpleNamespace(time=time, dts=dts, time_base=unit, duration=1000)


def clock() -> Clock:
    film = SimpleNamespace(times=Times(0.0, 0.0, None, None), end=None, tolerance=None, path=Path("v"))
    return Clock(film)


def test_a_frame_before_its_decoding_time_does_not_restart_the_clock():
    running = clock()
    placed = [running.place(frame(time, decoding)) for time, decoding in ((0, 0), (15, 5), (10, 15), (20, 20))]
    assert placed == [0, 15, None, 20]
    assert not running.restarted


def test_a_clock_continues_after_presentation_and_decoding_times_restart():
    running = clock()
    placed = [running.place(frame(time, time)) for time in (0, 1, 15, 0, 1)]
    assert placed == [0, 1, 15, 16, 17]
    assert running.restarted
