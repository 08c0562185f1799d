"""Video files that are damaged, odd, or do not say what they are: frames, or one error that names the file."""

from __future__ import annotations

import hashlib
import re
import threading
import weakref
from pathlib import Path

import av
import numpy as np
import pytest

from tieredkv.errors import VideoError
from tieredkv.video import sampling
from tieredkv.video.frames import load_frames, open_video

BOUND = 1000
"""More frames than any file here may give."""
PATIENCE_S = 20


class Stream:
    """A file that can only be written from the beginning to the end, as a pipe."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")

    def write(self, data: bytes) -> int:
        return self.file.write(data)


def write(
    path: Path,
    pictures,
    codec: str = "libx264",
    rate: int = 10,
    pixels: str = "yuv420p",
    format: str | None = None,
    pipe: bool = False,
    flags: dict[str, str] | None = None,
    keys: tuple[int, ...] = (),
    **options: str,
) -> Path:
    """A video of `pictures`, those in `keys` forced to be key frames; flags: the container's options."""
    output = Stream(path) if pipe else str(path)
    with av.open(output, "w", format=format, options=flags or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if i in keys:
                frame.pict_type = av.video.frame.PictureType.I
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if pipe:
        output.file.close()
    return path


def retime(path: Path, source: Path, times: list[float]) -> Path:
    """The packets of `source` (no B-frames), packet i shown at times[i] seconds."""
    with av.open(str(source)) as original, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(original.streams.video[0])
        packets = [packet for packet in original.demux(original.streams.video[0]) if packet.size]
        for packet, time in zip(packets, times, strict=True):
            packet.pts = round(time / packet.time_base)
            # Decoding times must grow, and lie before those of showing: only the latter are awkward.
            packet.dts = min(packet.dts - round(2 / packet.time_base), packet.pts)
            packet.duration = round(0.1 / packet.time_base)
            packet.stream = stream
            output.mux(packet)
    return path


def noise(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Pictures that each differ from the others, and do not compress."""
    return list(np.random.default_rng(0).integers(0, 255, (count, height, width, 3), dtype=np.uint8))


def greys(count: int, height: int, width: int) -> list[np.ndarray]:
    """Even pictures: number i has brightness 10 + 20 * i."""
    return [np.full((height, width, 3), 10 + 20 * i, np.uint8) for i in range(count)]


def levels(pictures) -> list[int]:
    """Which of `greys` each picture is."""
    return [round((float(picture.mean()) - 10) / 20) for picture in pictures]


def numbered(count: int) -> list[np.ndarray]:
    """Pictures, 48 x 64, that tell their number by two even halves, twelve levels each."""
    halves = greys(12, 48, 32)
    return [np.concatenate([halves[i // 12], halves[i % 12]], axis=1) for i in range(count)]


def numbers(pictures) -> list[int]:
    """Which of `numbered` each picture is."""
    pictures = list(pictures)
    left, right = (levels(picture[:, part] for picture in pictures) for part in (slice(4, 28), slice(36, 60)))
    return [12 * tens + ones for tens, ones in zip(left, right, strict=True)]


def sample(path: Path, fps: float, **options) -> list[np.ndarray]:
    return list(open_video(path, fps, **options).frames())


def outcome(path: Path, fps: float = 2, **options) -> tuple[int, str | None]:
    """How many frames came, and the message of the `VideoError` that ended them; fails on anything else."""
    given, raised = [], []

    def run() -> None:
        try:
            for picture in open_video(path, fps, **options).frames():
                given.append(picture.shape)
                assert len(given) < BOUND
        except BaseException as error:  # noqa: BLE001  looked at below
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it hangs"
    if not raised:
        assert given
        return len(given), None
    assert isinstance(raised[0], VideoError), raised[0]
    assert str(raised[0]).startswith(str(path))
    if given:
        assert re.search(r"stopped at [\d.]+ s|changes from .* at [\d.]+ s", str(raised[0]))
    return len(given), str(raised[0])


KINDS = {
    "faststart.mp4": {"flags": {"movflags": "faststart"}, "g": "10"},
    "plain.mp4": {"g": "10"},
    "cut.mkv": {"g": "10"},
    "cut.ts": {"g": "10"},
    "cut.avi": {"codec": "mpeg4"},
    "cut.webm": {"codec": "libvpx", "g": "10", "deadline": "realtime", "cpu-used": "8"},
}


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Twenty seconds of noise in each kind of file."""
    folder, pictures = tmp_path_factory.mktemp("whole"), noise(200, 32, 48)
    return {name: write(folder / name, pictures, **options) for name, options in KINDS.items()}


@pytest.fixture(scope="session")
def steady(tmp_path_factory):
    """Four seconds of numbered pictures without B-frames, a key frame each half second."""
    return write(tmp_path_factory.mktemp("steady") / "steady.mkv", numbered(40), bf="0", g="5")


def say_it_lasts(path: Path, tag: bytes) -> None:
    """Overwrite the length that matroska states for its video."""
    with av.open(str(path)) as container:
        stated = container.streams.video[0].metadata["DURATION"].encode()
    path.write_bytes(path.read_bytes().replace(stated, tag))


# ---- files that are not whole


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_gives_what_is_there_and_one_error(tmp_path, whole, kind, share):
    """A transport stream states no length, so what is left of it is a shorter video."""
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


def test_what_lies_before_end_suffices(tmp_path, whole):
    path = tmp_path / "cut.mkv"
    path.write_bytes(whole["cut.mkv"].read_bytes()[: whole["cut.mkv"].stat().st_size // 2])
    assert outcome(path, end=3.0) == (6, None)


def test_an_end_that_the_file_all_but_reaches_suffices(tmp_path, steady):
    """Four seconds that are said to be twenty."""
    path = tmp_path / "short.mkv"
    path.write_bytes(steady.read_bytes())
    say_it_lasts(path, b"00:00:20.000000000")
    assert outcome(path, fps=1, end=4.5) == (4, None)
    given, message = outcome(path, fps=1, end=6.0)
    assert given == 4
    assert "decoding stopped at 4.00 s (the file says it lasts 20.00 s)" in message


def test_a_truncated_file_is_found_out_when_seeking_too(tmp_path, whole):
    path = tmp_path / "faststart.mp4"
    path.write_bytes(whole[path.name].read_bytes()[: whole[path.name].stat().st_size // 2])
    given, message = outcome(path, fps=0.5)
    assert given == 5
    stopped = re.search(r"decoding stopped at ([\d.]+) s", message)
    assert 9 < float(stopped[1]) < 11


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits_are_concealed_or_one_error(tmp_path, whole, kind):
    stored, random = whole[kind].read_bytes(), np.random.default_rng(1)
    for flips in (3, 200):
        damaged = bytearray(stored)
        for at in random.integers(len(stored) // 4, len(stored) * 3 // 4, flips):
            damaged[at] ^= 1 << int(random.integers(8))
        path = tmp_path / kind
        path.write_bytes(damaged)
        given, _ = outcome(path)
        assert given <= 80


def test_a_file_without_a_byte_is_refused(tmp_path):
    path = tmp_path / "empty.mkv"
    path.touch()
    with pytest.raises(VideoError, match=r"empty\.mkv: not a readable video file"):
        open_video(path, 1)


def test_a_file_with_sound_only_is_refused(tmp_path):
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        output.mux(stream.encode(frame))
    with pytest.raises(VideoError, match=r"sound\.mkv: there is no video stream"):
        open_video(path, 1)


def test_a_header_without_frames_is_refused_when_opened(tmp_path, whole):
    stored = whole["faststart.mp4"].read_bytes()
    path = tmp_path / "header.mp4"
    path.write_bytes(stored[: stored.index(b"mdat") + 4])
    with pytest.raises(VideoError, match=r"header\.mp4: there is a video stream but not one frame in it"):
        open_video(path, 1)


def test_a_count_of_frames_that_is_missing_is_not_needed(tmp_path, whole):
    stored, count = whole["cut.avi"].read_bytes(), (200).to_bytes(4, "little")
    assert count in stored[:1000]
    path = tmp_path / "uncounted.avi"
    path.write_bytes(stored[:1000].replace(count, bytes(4)) + stored[1000:])
    assert outcome(path) == (40, None)


def test_a_codec_without_a_decoder_is_refused(tmp_path, steady):
    path = tmp_path / "unknown.mkv"
    path.write_bytes(steady.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_XXXXX/ISO/AVC"))
    with pytest.raises(VideoError, match=r"unknown\.mkv: FFmpeg has no decoder"):
        open_video(path, 1)


def test_a_file_that_vanishes_after_it_was_opened_is_named(tmp_path, steady):
    path = tmp_path / "gone.mkv"
    path.write_bytes(steady.read_bytes())
    source = open_video(path, 1)
    path.unlink()
    with pytest.raises(VideoError, match=r"gone\.mkv: was there when it was opened"):
        next(source.frames())
    with pytest.raises(VideoError, match=r"gone\.mkv: cannot be read"):
        source.sha256()


def test_a_file_that_shrinks_while_it_is_read_is_no_shorter_video(tmp_path, whole):
    path = tmp_path / "shrinking.ts"
    path.write_bytes(whole["cut.ts"].read_bytes())
    frames = open_video(path, 10).frames()
    next(frames)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match=r"shrinking\.ts: decoding stopped at [\d.]+ s \(it shrank"):
        list(frames)


# ---- odd pictures


@pytest.mark.parametrize(("width", "height"), [(1, 1), (8192, 16), (63, 47)])
@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [("odd.mkv", "ffv1", "yuv444p"), ("odd.avi", "rawvideo", "bgr24"), ("odd.mp4", "libx264", "yuv444p")],
    ids=["ffv1", "raw", "x264"],
)
def test_any_size_of_picture_is_read(tmp_path, name, codec, pixels, width, height):
    path = write(tmp_path / name, greys(10, height, width), codec, pixels=pixels)
    source = open_video(path, 5)
    assert (source.width, source.height) == (width, height)
    pictures = list(source.frames())
    assert {picture.shape for picture in pictures} == {(height, width, 3)}
    assert levels(pictures) == [0, 2, 4, 6, 8]


def test_ten_bits_are_read_as_eight(tmp_path):
    path = write(tmp_path / "deep.mkv", greys(10, 48, 64), "ffv1", pixels="yuv420p10le")
    pictures = sample(path, 10)
    assert pictures[0].dtype == np.uint8
    assert levels(pictures) == list(range(10))


def turned(path: Path, source: Path, degrees: int) -> Path:
    """An mp4 whose display matrix turns its pictures clockwise."""

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
def test_a_turned_picture_is_turned_upright(tmp_path, degrees, fps):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32] = 220  # upper left
    flat = write(tmp_path / "flat.mp4", [picture] * 100, g="5")
    source = open_video(turned(tmp_path / "turned.mp4", flat, degrees), fps)
    expected = np.rot90(picture, -degrees // 90)
    assert (source.height, source.width) == expected.shape[:2]
    for shown in source.frames():
        assert np.abs(shown.astype(int) - expected).mean() < 10


# ---- times


def test_a_variable_rate_is_sampled_by_time_when_seeking_too(tmp_path, steady):
    """A frame each 0.1 s, then one each 2 s."""
    times = [i / 10 for i in range(20)] + [2.0 + 2 * i for i in range(20)]
    path = retime(tmp_path / "vfr.mkv", steady, times)
    assert numbers(sample(path, 1 / 8, start=1)) == [10, 23, 27, 31, 35]


def test_joined_recordings_whose_clock_restarts_follow_each_other(tmp_path):
    part = write(tmp_path / "part.ts", numbered(30), g="10").read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(part + part)
    source = open_video(path, 5)
    assert source.seconds == pytest.approx(6, abs=0.3)
    pictures = numbers(source.frames())
    assert pictures == [*range(0, 30, 2), *range(0, 30, 2)]
    assert source.expected == len(pictures)


def test_frames_that_come_late_do_not_stretch_the_video(tmp_path, steady):
    """One frame far in the past among others that go on is no clock that was restarted."""
    times = [i / 10 for i in range(40)]
    times[25] = 0.45
    path = retime(tmp_path / "stray.mkv", steady, times)
    pictures = numbers(sample(path, 10))
    assert len(pictures) == 40
    assert pictures[24:28] == [24, 25, 26, 27]


def test_a_clock_that_restarts_within_an_indexed_file_ends_seeking(tmp_path, monkeypatch):
    """What the index says of such a file is of no use; a run that went by it begins again, and goes on from there."""
    path = write(tmp_path / "v.mkv", numbered(60), g="5", bf="0")
    place = sampling.Clock.place

    def restarting(self, frame):
        time = place(self, frame)
        self.restarted = frame.time > 5
        return time

    monkeypatch.setattr(sampling.Clock, "place", restarting)
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
def test_a_jump_far_forward_is_an_error_that_tells_it(tmp_path, stated):
    path = tmp_path / ("jump.mkv" if stated else "jump.ts")
    source = write(tmp_path / f"source{path.suffix}", numbered(20), bf="0", g="5")
    retime(path, source, [i / 10 if i < 10 else 5000 + i / 10 for i in range(20)])
    if stated:
        say_it_lasts(path, b"00:00:02.000000000")
    given, message = outcome(path)
    assert given <= 3
    assert re.search(r"decoding stopped at 0\.90 s \(the next frame is written as 5000\.\d+ s later", message)


def test_a_first_frame_that_comes_late_begins_the_video(tmp_path, steady):
    """Matroska states when the video ends, not how long it is."""
    path = retime(tmp_path / "late.mkv", steady, [30 + i / 10 for i in range(40)])
    source = open_video(path, 10, max_frames=20)
    assert (source.expected, source.fps) == (20, pytest.approx(5))
    assert numbers(source.frames()) == list(range(0, 40, 2))


def test_a_picture_that_stands_long_is_repeated(tmp_path, steady):
    times = [i / 10 if i < 20 else 50 + i / 10 for i in range(40)]
    path = retime(tmp_path / "still.mkv", steady, times)
    pictures = numbers(sample(path, 2))
    assert len(pictures) == 108
    assert pictures[4:104] == [19] * 100


@pytest.mark.parametrize(
    ("name", "codec", "format"),
    [("pipe.webm", "libvpx", "webm"), ("pipe.mkv", "libx264", "matroska"), ("pipe.mp4", "libx264", "mp4")],
)
def test_a_length_that_is_not_stated_is_found(tmp_path, name, codec, format):
    flags = {"movflags": "frag_keyframe+empty_moov"} if format == "mp4" else {}
    path = write(tmp_path / name, numbered(60), codec, format=format, pipe=True, flags=flags, g="5")
    source = open_video(path, 10, max_frames=6)
    assert source.seconds == pytest.approx(6, abs=0.15)
    assert (source.expected, source.fps) == (6, pytest.approx(1, rel=0.03))
    assert numbers(source.frames()) == pytest.approx([0, 10, 20, 30, 40, 50], abs=1)


def test_a_stated_length_is_not_looked_for(whole, monkeypatch):
    monkeypatch.setattr("tieredkv.video.timeline._scan", None)
    for kind in ("plain.mp4", "cut.mkv", "cut.avi", "cut.webm"):
        assert open_video(whole[kind], 2).expected == 40


def test_frames_without_times_are_counted(tmp_path):
    path = write(tmp_path / "raw.h264", numbered(40), format="h264", rate=20)
    source = open_video(path, 5)
    assert source.expected == 10
    assert numbers(source.frames()) == list(range(0, 40, 4))


def test_a_length_that_cannot_be_is_not_believed(tmp_path, steady):
    path = tmp_path / "endless.mkv"
    path.write_bytes(steady.read_bytes())
    say_it_lasts(path, b"9999999:00:00.0000")
    assert open_video(path, 2).expected == 8


# ---- start, end, max_frames


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Twelve seconds, 120 numbered pictures with B-frames, a key frame each half second."""
    return write(tmp_path_factory.mktemp("counted") / "counted.mp4", numbered(120), g="5", bf="2")


def test_a_span_is_sampled_from_its_start_to_before_its_end(counted):
    source = open_video(counted, 2, start=3.0, end=5.0)
    assert (source.expected, source.seconds) == (4, 2.0)
    assert numbers(source.frames()) == [30, 35, 40, 45]


def test_an_end_past_the_video_is_its_end(counted):
    source = open_video(counted, 1, start=9.5, end=100)
    assert numbers(source.frames()) == [95, 105, 115]
    assert source.expected == 3


def test_a_start_past_the_video_tells_how_long_it_is(counted):
    with pytest.raises(VideoError, match=r"counted\.mp4: start=12\.5 is past the end of the video, .* 12\.00 s"):
        open_video(counted, 1, start=12.5)


def test_max_frames_are_spread_over_the_span(counted):
    source = open_video(counted, 10, start=2, end=10, max_frames=4)
    assert (source.fps, source.expected) == (0.5, 4)
    assert numbers(source.frames()) == [20, 40, 60, 80]


def test_max_frames_that_are_not_reached_change_nothing(counted):
    source = open_video(counted, 1, max_frames=12)
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
def test_a_span_that_is_none_is_refused(counted, span, message):
    with pytest.raises(VideoError, match=message):
        open_video(counted, 1, **span)


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
def test_seeking_gives_the_frames_that_linear_decoding_gives(groups, fps, start, end):
    sought, linear = (open_video(groups, fps, start=start, end=end) for _ in range(2))
    linear._seek = False
    sought, linear = list(sought.frames()), list(linear.frames())
    assert np.array_equal(np.stack(sought), np.stack(linear))


def ticks(path: Path, seek: bool = True, **options) -> list[float]:
    seen: list[float] = []
    source = open_video(path, **options)
    source._seek &= seek
    for _ in source.frames(seen.append):
        pass
    return seen


@pytest.mark.parametrize("options", [{"fps": 0.25}, {"fps": 2, "start": 10, "end": 11}], ids=["sparse", "late start"])
def test_seeking_decodes_fewer_frames(counted, options):
    assert len(ticks(counted, **options)) < 0.5 * len(ticks(counted, seek=False, **options))


def test_formats_without_an_index_are_read_to_the_end(whole):
    assert len(ticks(whole["cut.ts"], fps=0.25)) == 200


def test_an_index_that_leads_past_the_time_wanted_is_not_followed(counted, monkeypatch):
    """Every seek lands a second too late: decoding begins again, and gives no frame twice."""
    enter_at = sampling._Playback._enter_at
    monkeypatch.setattr(sampling._Playback, "_enter_at", lambda self, time: enter_at(self, time + 100))
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
    """Filled with one entry for each container that is closed."""
    closed, opened = [], sampling.opened

    class Counting:
        def __init__(self, path):
            self.context = opened(path)

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
        given.extend(open_video(counted, 10).frames(stop))
    assert numbers(given) == list(range(20))
    assert closed == [True]


def test_an_iterator_that_is_closed_closes_the_file(counted, monkeypatch):
    closed = closes(monkeypatch)
    frames = open_video(counted, 10).frames()
    next(frames)
    assert closed == []
    frames.close()
    assert closed == [True]


def test_frames_may_be_had_again_and_at_once(counted):
    source = open_video(counted, 1)
    first, second = source.frames(), source.frames()
    both = [(next(first), next(second)) for _ in range(source.expected)]
    assert all(np.array_equal(one, other) for one, other in both)


def test_frames_may_be_decoded_on_another_thread(counted):
    source, given = open_video(counted, 1), []
    thread = threading.Thread(target=lambda: given.extend(source.frames()))
    thread.start()
    thread.join()
    assert numbers(given) == list(range(0, 120, 10))


def test_frames_are_not_held(counted):
    """Of 120 frames handed out, those that nobody keeps are gone."""
    pictures = [weakref.ref(picture) for picture in open_video(counted, 10).frames()]
    assert len(pictures) == 120
    assert sum(picture() is not None for picture in pictures) <= 1


def test_the_hash_of_a_file_is_that_of_its_bytes(counted):
    assert open_video(counted, 1).sha256() == hashlib.sha256(counted.read_bytes()).hexdigest()


def test_a_name_with_a_colon_is_a_file(tmp_path, monkeypatch, steady):
    (tmp_path / "12:30.mkv").write_bytes(steady.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(load_frames("12:30.mkv", 1).pixels) == 4


def test_a_cover_is_not_the_video(tmp_path):
    """Music with a picture of its sleeve is no video."""
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
        open_video(path, 1)
