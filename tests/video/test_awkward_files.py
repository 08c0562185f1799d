"""Damaged and unusual video files give frames, or one error that names the file."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from films import KINDS, greys, levels, numbered, numbers, retime, sample, set_length, ticks, write
from helpers import ended

from tieredkv.errors import VideoError
from tieredkv.video.clock import Clock
from tieredkv.video.frames import load_frames, open_video
from tieredkv.video.sampling import Sampling

pytestmark = pytest.mark.files

BOUND = 1000
"""More frames than any file here may give."""


def outcome(path: Path, fps: float = 2, **options) -> tuple[int, str | None]:
    """Number of frames, and the message of the `VideoError` that ended them; fails on any other error."""
    shapes, errors = [], []

    def run() -> None:
        try:
            for picture in open_video(path, Sampling(fps, **options)).frames():
                shapes.append(picture.shape)
                assert len(shapes) < BOUND
        except BaseException as error:  # noqa: BLE001  checked below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ended(thread), "it hangs"
    if not errors:
        assert shapes
        return len(shapes), None
    assert isinstance(errors[0], VideoError), errors[0]
    assert str(errors[0]).startswith(str(path))
    if shapes:
        assert re.search(r"stopped at [\d.]+ s|changes from .* at [\d.]+ s", str(errors[0]))
    return len(shapes), str(errors[0])


# ---- incomplete files


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_gives_the_frames_it_has_and_one_error(tmp_path, whole, kind, share):
    """A transport stream states no length, so a truncated one is a shorter video."""
    path = tmp_path / kind
    path.write_bytes(whole[kind].read_bytes()[: int(whole[kind].stat().st_size * share)])
    given, message = outcome(path)
    assert given <= 40 * share + 1
    if kind.endswith("ts"):
        assert message is None
    elif kind == "plain.mp4":  # its header comes last
        assert "not a readable video file" in message
    else:
        assert "decoding stopped at" in message


def test_a_file_truncated_after_end_is_no_error(tmp_path, whole):
    path = tmp_path / "cut.mkv"
    path.write_bytes(whole["cut.mkv"].read_bytes()[: whole["cut.mkv"].stat().st_size // 2])
    assert outcome(path, end=3.0) == (6, None)


def test_an_end_just_past_the_last_frame_is_no_error(tmp_path, steady):
    """Four seconds in a file that states twenty."""
    path = tmp_path / "short.mkv"
    path.write_bytes(steady.read_bytes())
    set_length(path, b"00:00:20.000000000")
    assert outcome(path, fps=1, end=4.5) == (4, None)
    given, message = outcome(path, fps=1, end=6.0)
    assert given == 4
    assert "decoding stopped at 4.00 s (the file says it lasts 20.00 s)" in message


def test_a_truncated_file_is_an_error_also_when_seeking(tmp_path, whole):
    path = tmp_path / "faststart.mp4"
    path.write_bytes(whole[path.name].read_bytes()[: whole[path.name].stat().st_size // 2])
    given, message = outcome(path, fps=0.5)
    assert given == 5
    stopped = re.search(r"decoding stopped at ([\d.]+) s", message)
    assert 9 < float(stopped[1]) < 11


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits_are_concealed_or_give_one_error(tmp_path, whole, kind):
    stored, random = whole[kind].read_bytes(), np.random.default_rng(1)
    for flips in (3, 200):
        damaged = bytearray(stored)
        for at in random.integers(len(stored) // 4, len(stored) * 3 // 4, flips):
            damaged[at] ^= 1 << int(random.integers(8))
        path = tmp_path / kind
        path.write_bytes(damaged)
        given, _ = outcome(path)
        assert given <= 80


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "empty.mkv"
    path.touch()
    with pytest.raises(VideoError, match=r"empty\.mkv: not a readable video file"):
        open_video(path, Sampling(1))


def test_a_file_with_sound_only_is_refused(tmp_path):
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        output.mux(stream.encode(frame))
    with pytest.raises(VideoError, match=r"sound\.mkv: there is no video stream"):
        open_video(path, Sampling(1))


def test_a_header_without_frames_is_refused_when_opened(tmp_path, whole):
    stored = whole["faststart.mp4"].read_bytes()
    path = tmp_path / "header.mp4"
    path.write_bytes(stored[: stored.index(b"mdat") + 4])
    with pytest.raises(VideoError, match=r"header\.mp4: its video stream has no frame"):
        open_video(path, Sampling(1))


def test_a_missing_count_of_frames_is_not_needed(tmp_path, whole):
    stored, count = whole["cut.avi"].read_bytes(), (200).to_bytes(4, "little")
    assert count in stored[:1000]
    path = tmp_path / "uncounted.avi"
    path.write_bytes(stored[:1000].replace(count, bytes(4)) + stored[1000:])
    assert outcome(path) == (40, None)


def test_a_codec_without_a_decoder_is_refused(tmp_path, steady):
    path = tmp_path / "unknown.mkv"
    path.write_bytes(steady.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_XXXXX/ISO/AVC"))
    with pytest.raises(VideoError, match=r"unknown\.mkv: FFmpeg has no decoder"):
        open_video(path, Sampling(1))


def test_a_file_removed_after_it_was_opened_is_named(tmp_path, steady):
    path = tmp_path / "gone.mkv"
    path.write_bytes(steady.read_bytes())
    source = open_video(path, Sampling(1))
    path.unlink()
    with pytest.raises(VideoError, match=r"gone\.mkv: the file was removed after it was opened"):
        next(source.frames())
    with pytest.raises(VideoError, match=r"gone\.mkv: cannot be read"):
        source.sha256()


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path, whole):
    path = tmp_path / "shrinking.ts"
    path.write_bytes(whole["cut.ts"].read_bytes())
    frames = open_video(path, Sampling(10)).frames()
    next(frames)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match=r"shrinking\.ts: decoding stopped at [\d.]+ s \(it shrank"):
        list(frames)


# ---- unusual pictures


@pytest.mark.parametrize(("width", "height"), [(1, 1), (8192, 16), (63, 47)])
@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [("odd.mkv", "ffv1", "yuv444p"), ("odd.avi", "rawvideo", "bgr24"), ("odd.mp4", "libx264", "yuv444p")],
    ids=["ffv1", "raw", "x264"],
)
def test_any_size_of_picture_is_read(tmp_path, name, codec, pixels, width, height):
    path = write(tmp_path / name, greys(10, height, width), codec, pixels=pixels)
    source = open_video(path, Sampling(5))
    assert (source.width, source.height) == (width, height)
    pictures = list(source.frames())
    assert {picture.shape for picture in pictures} == {(height, width, 3)}
    assert levels(pictures) == [0, 2, 4, 6, 8]


def test_ten_bits_are_read_as_eight(tmp_path):
    path = write(tmp_path / "deep.mkv", greys(10, 48, 64), "ffv1", pixels="yuv420p10le")
    pictures = sample(path, 10)
    assert pictures[0].dtype == np.uint8
    assert levels(pictures) == list(range(10))


def rotated(path: Path, source: Path, degrees: int) -> Path:
    """An MP4 whose display matrix rotates its pictures clockwise."""

    def matrix(a: int, b: int, c: int, d: int) -> bytes:
        values = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 0x40000000)
        return b"".join(value.to_bytes(4, "big", signed=True) for value in values)

    stored = source.read_bytes()
    at = stored.index(matrix(1, 0, 0, 1), stored.index(b"tkhd"))
    quarter = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    path.write_bytes(stored[:at] + matrix(*quarter) + stored[at + 36 :])
    return path


@pytest.mark.parametrize("fps", [10, 0.4], ids=["linear", "seeking"])
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_display_matrix_rotates_pictures(tmp_path, degrees, fps):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32] = 220  # upper left
    flat = write(tmp_path / "flat.mp4", [picture] * 100, g="5")
    source = open_video(rotated(tmp_path / "rotated.mp4", flat, degrees), Sampling(fps))
    expected = np.rot90(picture, -degrees // 90)
    assert (source.height, source.width) == expected.shape[:2]
    for shown in source.frames():
        assert np.abs(shown.astype(int) - expected).mean() < 10


# ---- times


def test_a_variable_rate_is_sampled_by_time_also_when_seeking(tmp_path, steady):
    """A frame each 0.1 s, then one each 2 s."""
    times = [i / 10 for i in range(20)] + [2.0 + 2 * i for i in range(20)]
    path = retime(tmp_path / "vfr.mkv", steady, times)
    assert numbers(sample(path, 1 / 8, start=1)) == [10, 23, 27, 31, 35]


def test_joined_recordings_whose_clock_restarts_follow_each_other(tmp_path):
    part = write(tmp_path / "part.ts", numbered(30), g="10").read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(part + part)
    source = open_video(path, Sampling(5))
    assert source.seconds == pytest.approx(6, abs=0.3)
    pictures = numbers(source.frames())
    assert pictures == [*range(0, 30, 2), *range(0, 30, 2)]
    assert source.expected == len(pictures)


def test_frames_that_come_late_do_not_stretch_the_video(tmp_path, steady):
    """One frame far in the past does not restart the clock if the others go on."""
    times = [i / 10 for i in range(40)]
    times[25] = 0.45
    path = retime(tmp_path / "stray.mkv", steady, times)
    pictures = numbers(sample(path, 10))
    assert len(pictures) == 40
    assert pictures[24:28] == [24, 25, 26, 27]


def test_a_clock_that_restarts_within_an_indexed_file_ends_seeking(tmp_path, monkeypatch):
    """The index of such a file is of no use; after a seek, decoding starts again from the beginning."""
    path = write(tmp_path / "v.mkv", numbered(60), g="5", bf="0")
    place = Clock.place

    def restarting(self, frame):
        time = place(self, frame)
        self.restarted = frame.time > 5
        return time

    monkeypatch.setattr(Clock, "place", restarting)
    seen = ticks(path, fps=0.8)
    assert len(seen) > 60
    assert seen == sorted(seen)
    assert numbers(sample(path, 0.8)) == [0, 12, 25, 37, 50]


def test_a_frame_a_little_in_the_past_is_left_out(tmp_path, steady):
    times = [i / 10 for i in range(40)]
    times[20] = 1.75
    path = retime(tmp_path / "jitter.mkv", steady, times)
    assert numbers(sample(path, 10))[17:23] == [17, 18, 19, 19, 21, 22]


@pytest.mark.parametrize("stated", [True, False], ids=["length stated", "length unknown"])
def test_a_jump_far_forward_is_an_error_that_names_it(tmp_path, stated):
    path = tmp_path / ("jump.mkv" if stated else "jump.ts")
    source = write(tmp_path / f"source{path.suffix}", numbered(20), bf="0", g="5")
    retime(path, source, [i / 10 if i < 10 else 5000 + i / 10 for i in range(20)])
    if stated:
        set_length(path, b"00:00:02.000000000")
    given, message = outcome(path)
    assert given <= 3
    assert re.search(r"decoding stopped at 0\.90 s \(the next frame has a timestamp 5000\.\d+ s later", message)


def test_the_video_begins_at_a_late_first_frame(tmp_path, steady):
    """Matroska states the time at which the video ends, not its length."""
    path = retime(tmp_path / "late.mkv", steady, [30 + i / 10 for i in range(40)])
    source = open_video(path, Sampling(10, max_frames=20))
    assert (source.expected, source.fps) == (20, pytest.approx(5))
    assert numbers(source.frames()) == list(range(0, 40, 2))


def test_a_picture_that_is_shown_long_is_repeated(tmp_path, steady):
    times = [i / 10 if i < 20 else 50 + i / 10 for i in range(40)]
    path = retime(tmp_path / "still.mkv", steady, times)
    pictures = numbers(sample(path, 2))
    assert len(pictures) == 108
    assert pictures[4:104] == [19] * 100


@pytest.mark.parametrize(
    ("name", "codec", "format"),
    [("pipe.webm", "libvpx", "webm"), ("pipe.mkv", "libx264", "matroska"), ("pipe.mp4", "libx264", "mp4")],
)
def test_a_length_that_is_not_stated_is_found_in_the_packets(tmp_path, name, codec, format):
    flags = {"movflags": "frag_keyframe+empty_moov"} if format == "mp4" else {}
    path = write(tmp_path / name, numbered(60), codec, format=format, pipe=True, flags=flags, g="5")
    source = open_video(path, Sampling(10, max_frames=6))
    assert source.seconds == pytest.approx(6, abs=0.15)
    assert (source.expected, source.fps) == (6, pytest.approx(1, rel=0.03))
    assert numbers(source.frames()) == pytest.approx([0, 10, 20, 30, 40, 50], abs=1)


def test_a_stated_length_is_not_searched_in_the_packets(whole, monkeypatch):
    monkeypatch.setattr("tieredkv.video.length._scan", None)
    for kind in ("plain.mp4", "cut.mkv", "cut.avi", "cut.webm"):
        assert open_video(whole[kind], Sampling(2)).expected == 40


def test_frames_without_times_are_counted(tmp_path):
    path = write(tmp_path / "raw.h264", numbered(40), format="h264", rate=20)
    source = open_video(path, Sampling(5))
    assert source.expected == 10
    assert numbers(source.frames()) == list(range(0, 40, 4))


def test_an_impossible_length_is_ignored(tmp_path, steady):
    path = tmp_path / "endless.mkv"
    path.write_bytes(steady.read_bytes())
    set_length(path, b"9999999:00:00.0000")
    assert open_video(path, Sampling(2)).expected == 8


# ---- unusual names and streams


def test_a_name_with_a_colon_is_a_file(tmp_path, monkeypatch, steady):
    (tmp_path / "12:30.mkv").write_bytes(steady.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(load_frames("12:30.mkv", Sampling(1)).pixels) == 4


def test_a_cover_is_not_the_video(tmp_path):
    """Music with a cover picture is not a video."""
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as output:
        sound = output.add_stream("libmp3lame", rate=44100, layout="mono")
        cover = output.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 64
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        output.mux(cover.encode(av.VideoFrame.from_ndarray(greys(1, 64, 64)[0], format="rgb24")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        output.mux(sound.encode(frame))
        output.mux(sound.encode())
    with pytest.raises(VideoError, match=r"song\.mp3: there is no video stream"):
        open_video(path, Sampling(1))
