"""When the picture of a file ends: complete files are accepted, whatever else is in them; truncated ones are errors."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from films import noise, sample

from tieredkv.errors import VideoError
from tieredkv.video.frames import open_video
from tieredkv.video.sampling import Sampling

pytestmark = pytest.mark.files

NOISE = noise(1)[0]
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}


def second(number: int) -> np.ndarray:
    """A picture whose brightness is its second, and which is large in any codec."""
    return np.clip(20 + 10 * number + (NOISE.astype(int) - 128) // 16, 0, 255).astype(np.uint8)


def seconds(pictures) -> list[int]:
    return [round((float(picture.mean()) - 20) / 10) for picture in pictures]


def film(
    path: Path,
    picture: tuple[int, int],
    sound: tuple[int, int] | None,
    codec: str = "libx264",
    voice: str = "aac",
    rate: int = 48000,
    flags: dict[str, str] | None = None,
) -> Path:
    """Picture and sound, each from one second to another; the picture at second i of the file is `second(i)`."""
    options = {"libx264": {"g": "10", "bf": "0", "preset": "ultrafast"}}.get(codec, {"g": "10"})
    with av.open(str(path), "w", options=flags or {}) as out:
        video = out.add_stream(codec, rate=10, options=options)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = out.add_stream(voice, rate=rate, layout="mono") if sound else None
        size = rate // 10
        for i in range(10 * max(picture[1], sound[1] if sound else 0)):
            if audio is not None and 10 * sound[0] <= i < 10 * sound[1]:
                kind = "flt" if voice == "libopus" else "fltp"
                part = av.AudioFrame.from_ndarray(np.zeros((1, size), np.float32), format=kind, layout="mono")
                part.rate, part.pts, part.time_base = rate, i * size, Fraction(1, rate)
                out.mux(audio.encode(part))
            if 10 * picture[0] <= i < 10 * picture[1]:
                frame = av.VideoFrame.from_ndarray(second(i // 10), format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 10)
                out.mux(video.encode(frame))
        out.mux(video.encode())
        if audio is not None:
            out.mux(audio.encode())
    return path


def cut(path: Path, share: float = 0.5) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def without_lengths(path: Path) -> Path:
    """Remove the lengths of single tracks, which browsers' recorders do not write."""
    path.write_bytes(path.read_bytes().replace(b"DURATION", b"XURATION"))
    return path


def boxes(path: Path) -> list[tuple[bytes, bytes]]:
    data, at, found = path.read_bytes(), 0, []
    while at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        found.append((kind, data[at : at + size]))
        at += size
    return found


def live(path: Path, first: int) -> Path:
    """Keep the fragments of an MP4 from number `first` on, as in the recording of a live stream."""
    parts = boxes(path)
    begin = [n for n, (kind, _) in enumerate(parts) if kind == b"moof"][first]
    kept = [data for n, (kind, data) in enumerate(parts) if kind in (b"ftyp", b"moov") or n >= begin]
    path.write_bytes(b"".join(kept))
    return path


# ---- tracks of different lengths


@pytest.mark.parametrize(
    ("name", "codec", "voice", "rate"),
    [
        ("v.mp4", "libx264", "aac", 48000),
        ("v.mkv", "libx264", "aac", 48000),
        ("v.webm", "libvpx", "libopus", 48000),
        ("v.flv", "libx264", "aac", 44100),
        ("v.ts", "libx264", "aac", 48000),
        ("v.nut", "libx264", "aac", 48000),
    ],
)
@pytest.mark.parametrize(
    ("picture", "sound"), [((0, 3), (0, 8)), ((2, 5), (0, 8)), ((3, 8), (0, 4))], ids=["short", "inside", "late"]
)
def test_a_picture_has_its_own_beginning_and_end(tmp_path, name, codec, voice, rate, picture, sound):
    path = without_lengths(film(tmp_path / name, picture, sound, codec, voice, rate))
    source = open_video(path, Sampling(1))
    assert source.start == pytest.approx(picture[0], abs=0.1)
    assert source.seconds == pytest.approx(picture[1] - picture[0], abs=0.15)
    assert seconds(source.frames())[: picture[1] - picture[0]] == list(range(*picture))


@pytest.mark.parametrize(("name", "voice", "rate"), [("v.mkv", "aac", 48000), ("v.flv", "aac", 44100)])
@pytest.mark.parametrize("picture", [(0, 8), (2, 8)], ids=["from the beginning", "late"])
@pytest.mark.parametrize("tags", [True, False], ids=["lengths", "one length"])
def test_a_truncated_file_is_an_error_whichever_length_is_stated(tmp_path, name, voice, rate, picture, tags):
    path = cut(film(tmp_path / name, picture, (0, 8), voice=voice, rate=rate))
    if not tags:
        without_lengths(path)
    with pytest.raises(VideoError, match=r"decoding stopped at [2-5]\.\d+ s \(.*\): the file is damaged or cut short"):
        sample(path, 1)


def test_a_length_that_counts_from_the_first_frame_is_no_error(tmp_path):
    """Some programs state the length of a track, others its end."""
    path = film(tmp_path / "v.mkv", (3, 8), (0, 4))
    stored = path.read_bytes()
    assert stored.count(b"00:00:08.000000000") == 1
    path.write_bytes(stored.replace(b"00:00:08.000000000", b"00:00:05.000000000"))
    source = open_video(path, Sampling(1))
    assert source.seconds == pytest.approx(5, abs=0.1)
    assert seconds(source.frames()) == [3, 4, 5, 6, 7]


# ---- fragments


def test_a_part_of_a_live_stream_is_complete(tmp_path):
    path = live(film(tmp_path / "v.mp4", (0, 8), None, flags=FRAGMENTS), first=3)
    source = open_video(path, Sampling(10, max_frames=5))
    assert (source.start, source.seconds, source.fps) == (0, pytest.approx(5, abs=0.1), pytest.approx(1, abs=0.02))
    assert seconds(source.frames()) == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("sampling", [{"fps": 1}, {"fps": 10, "max_frames": 3}], ids=["by rate", "spread"])
@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
def test_an_incomplete_last_fragment_is_an_error(tmp_path, part, sampling):
    path = film(tmp_path / "v.mp4", (0, 8), (0, 8), flags=FRAGMENTS)
    if part:
        live(path, first=2)
    cut(path)
    with pytest.raises(VideoError, match=r"decoding stopped at [\d.]+ s \(.*\): the file is damaged or cut short"):
        sample(path, **sampling)


def test_a_fragment_without_its_data_is_an_error(tmp_path):
    path = film(tmp_path / "v.mp4", (0, 4), None, flags=FRAGMENTS)
    parts = boxes(path)
    last = max(n for n, (kind, _) in enumerate(parts) if kind == b"moof")
    path.write_bytes(b"".join(data for _, data in parts[: last + 1]))
    with pytest.raises(VideoError, match="its last fragment is incomplete"):
        sample(path, 1)


def test_a_fragmented_file_truncated_after_end_is_no_error(tmp_path):
    path = cut(film(tmp_path / "v.mp4", (0, 8), None, flags=FRAGMENTS))
    assert seconds(sample(path, 1, end=2)) == [0, 1]


def test_an_index_shows_that_whole_fragments_are_missing(tmp_path):
    flags = {"movflags": FRAGMENTS["movflags"] + "+dash+global_sidx"}
    path = film(tmp_path / "v.mp4", (0, 8), None, flags=flags)
    parts = boxes(path)
    fifth = [n for n, (kind, _) in enumerate(parts) if kind == b"moof"][4]
    path.write_bytes(b"".join(data for _, data in parts[:fifth]))
    with pytest.raises(VideoError, match=r"decoding stopped at 4\.00 s \(the file says it lasts 8\.00 s"):
        sample(path, 1)


@pytest.mark.parametrize("picture", [(0, 8), (4, 8)], ids=["from the beginning", "late"])
@pytest.mark.parametrize("offset", ["0", "7200"])
def test_an_index_may_have_another_zero_than_its_fragments(tmp_path, picture, offset):
    flags = {"movflags": "frag_keyframe+dash", "avoid_negative_ts": "disabled", "output_ts_offset": offset}
    source = open_video(film(tmp_path / "v.mp4", picture, (0, 8), flags=flags), Sampling(1))
    assert source.seconds == pytest.approx(picture[1] - picture[0], abs=0.1)
    assert seconds(source.frames()) == list(range(*picture))


def test_an_index_with_another_zero_shows_that_fragments_are_missing(tmp_path):
    flags = {"movflags": FRAGMENTS["movflags"] + "+dash+global_sidx"}
    path = film(tmp_path / "v.mp4", (0, 8), None, flags=flags)
    parts = boxes(path)
    fifth = [n for n, (kind, _) in enumerate(parts) if kind == b"moof"][4]
    path.write_bytes(b"".join(data for _, data in parts[:fifth]))
    data = bytearray(path.read_bytes())
    at = data.index(b"sidx")
    assert data[at + 4] == 1
    data[at + 16 : at + 24] = struct.pack(">q", -4 * 10240)  # of the earliest time
    path.write_bytes(data)
    with pytest.raises(VideoError, match=r"the file says it lasts 8\.00 s"):
        sample(path, 1)


def unfinished(kind: bytes) -> bytes:
    return struct.pack(">I4s", 44, kind) + bytes(12)


@pytest.mark.parametrize(
    "tail",
    [
        *(unfinished(kind) for kind in (b"styp", b"sidx", b"emsg", b"prft", b"moof", b"mdat")),
        *(unfinished(kind) + bytes(24) for kind in (b"styp", b"sidx", b"prft")),
        bytes(70000),
        b"\0\0\0",
    ],
    ids=lambda tail: f"{tail[4:8].decode()} {len(tail)}".strip("\0"),
)
def test_a_file_that_ends_at_the_beginning_of_a_fragment_is_an_error(tmp_path, tail):
    path = film(tmp_path / "v.mp4", (0, 4), None, flags=FRAGMENTS)
    parts = boxes(path)
    assert parts[-1][0] == b"mfra"
    path.write_bytes(b"".join(data for _, data in parts[:-1]) + tail)
    with pytest.raises(VideoError, match="its last fragment is incomplete"):
        sample(path, 1)


@pytest.mark.parametrize("tail", [b"", bytes(4096), unfinished(b"mfra"), unfinished(b"free"), unfinished(b"skip")])
def test_a_file_that_ends_in_a_box_after_the_fragments_is_no_error(tmp_path, tail):
    path = film(tmp_path / "v.mp4", (0, 4), None, flags=FRAGMENTS)
    path.write_bytes(b"".join(data for kind, data in boxes(path) if kind != b"mfra") + tail)
    assert seconds(sample(path, 1)) == [0, 1, 2, 3]


# ---- written to a pipe


class Pipe:
    """A file without `seek`, so that no length is written at the end."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> int:
        self.data += bytes(data)
        return len(data)


def piped(path: Path, kind: str, codec: str, length: int = 6, flags: dict[str, str] | None = None) -> Path:
    pipe = Pipe()
    with av.open(pipe, "w", format=kind, options=flags or {}) as out:
        video = out.add_stream(codec, rate=10, options={"g": "10"})
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for i in range(10 * length):
            frame = av.VideoFrame.from_ndarray(second(i // 10), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            out.mux(video.encode(frame))
        out.mux(video.encode())
    path.write_bytes(pipe.data)
    return path


def test_an_avi_without_a_length_is_complete(tmp_path):
    source = open_video(piped(tmp_path / "v.avi", "avi", "mpeg4"), Sampling(1))
    assert source.seconds == pytest.approx(6, abs=0.1)
    assert seconds(source.frames()) == [0, 1, 2, 3, 4, 5]


LIVE = {"live": "1", "cluster_time_limit": "1000"}


@pytest.mark.parametrize(
    ("kind", "codec", "flags"),
    [("webm", "libvpx", LIVE), ("webm", "libvpx", None), ("matroska", "libx264", None)],
    ids=["live", "webm", "mkv"],
)
def test_a_matroska_file_without_a_length_is_complete_unless_cut_within_a_block(tmp_path, kind, codec, flags):
    path = piped(tmp_path / "v.mkv", kind, codec, 4, flags)
    assert seconds(sample(path, 1)) == [0, 1, 2, 3]
    stored, refused = path.read_bytes(), 0
    for more in range(4):  # one or two of these may end between two elements
        path.write_bytes(stored[: len(stored) // 2 + more])
        try:
            sample(path, 1)
        except VideoError as error:
            refused += "its last cluster is incomplete" in str(error)
    assert refused >= 2
    assert seconds(sample(path, 1, end=1)) == [0]


@pytest.mark.parametrize(
    "tail", [b"\xa3", b"\xa3\x41", b"\x1f\x43\xb6\x75", bytes(70000)], ids=lambda tail: str(len(tail))
)
def test_a_live_stream_that_ends_at_the_beginning_of_an_element_is_an_error(tmp_path, tail):
    path = piped(tmp_path / "v.webm", "webm", "libvpx", 2, LIVE)
    path.write_bytes(path.read_bytes() + tail)
    with pytest.raises(VideoError, match="its last cluster is incomplete"):
        sample(path, 1)


@pytest.mark.parametrize(
    "tail", [bytes(9), bytes(5000), b"\xff" * 9, b"\r\n", b"\n" * 20], ids=lambda tail: f"{tail[0]}-{len(tail)}"
)
def test_other_bytes_at_the_end_of_a_live_stream_are_no_error(tmp_path, tail):
    path = piped(tmp_path / "v.webm", "webm", "libvpx", 2, LIVE)
    path.write_bytes(path.read_bytes() + tail)
    assert seconds(sample(path, 1)) == [0, 1]


@pytest.mark.parametrize("sound", [None, (0, 16)], ids=["picture", "with sound"])
def test_a_truncated_windows_media_file_is_an_error(tmp_path, sound):
    path = film(tmp_path / "v.wmv", (0, 16), sound, "mpeg4", "libmp3lame", 44100)
    assert seconds(sample(path, 1)) == list(range(16))
    with pytest.raises(VideoError, match="the file is damaged or cut short"):
        sample(cut(path, 0.3), 1)


def test_a_windows_media_broadcast_states_no_length(tmp_path):
    path = film(tmp_path / "v.wmv", (0, 8), None, "mpeg4")
    data = bytearray(path.read_bytes())
    at = data.index(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    data[at + 64 : at + 72] = struct.pack("<Q", 10**9)
    data[at + 88] |= 1
    path.write_bytes(data)
    assert seconds(sample(path, 1)) == list(range(8))


# ---- edit lists


def edited(path: Path, seconds: int, begin: int = 0) -> Path:
    """Trim a late picture: its second edit, after the empty one, shows this many seconds."""
    data = bytearray(path.read_bytes())
    at = data.index(b"elst")
    count, _, empty = struct.unpack_from(">IIi", data, at + 8)
    _, offset = struct.unpack_from(">Ii", data, at + 24)
    assert (count, empty) == (2, -1)
    struct.pack_into(">Ii", data, at + 24, 1000 * seconds, offset + 10240 * begin)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("length", "begin", "shown"), [(2, 0, [3, 4]), (4, 0, [3, 4, 5, 6]), (9, 3, [6, 7])])
def test_a_late_picture_may_be_trimmed(tmp_path, length, begin, shown):
    """The last edit is longer than the media."""
    source = open_video(edited(film(tmp_path / "v.mp4", (3, 8), (0, 8)), length, begin), Sampling(1))
    assert (source.start, source.seconds) == (3, pytest.approx(len(shown), abs=0.1))
    assert seconds(source.frames()) == shown


def test_a_truncated_file_with_a_late_trimmed_picture_is_an_error(tmp_path):
    path = edited(film(tmp_path / "v.mp4", (3, 8), (0, 8), flags={"movflags": "faststart"}), 4)
    with pytest.raises(VideoError, match="the file is damaged or cut short"):
        sample(cut(path, 0.6), 1)


# ---- the file's own clock


def test_start_and_end_are_seconds_of_the_file(tmp_path):
    path = film(tmp_path / "v.mp4", (3, 8), (0, 8))
    source = open_video(path, Sampling(1, start=4, end=6))
    assert (source.start, source.seconds) == (4, 2)
    assert seconds(source.frames()) == [4, 5]


def test_a_start_before_the_picture_means_the_first_frame(tmp_path):
    source = open_video(film(tmp_path / "v.mp4", (3, 8), (0, 8)), Sampling(1, start=1, end=5))
    assert source.start == pytest.approx(3, abs=0.03)
    assert seconds(source.frames()) == [3, 4]


def test_an_end_before_the_picture_is_an_error_with_its_time(tmp_path):
    path = film(tmp_path / "v.mp4", (3, 8), (0, 8))
    with pytest.raises(VideoError, match=r"v\.mp4: end=2 is before the first picture, which comes at 3\.00 s"):
        open_video(path, Sampling(1, end=2))


def test_a_start_past_the_picture_is_an_error_with_its_end(tmp_path):
    path = film(tmp_path / "v.mp4", (3, 8), (0, 12))
    with pytest.raises(VideoError, match=r"v\.mp4: start=9 is past the end of the video, which ends at 8\.00 s"):
        open_video(path, Sampling(1, start=9))


def test_timestamps_that_do_not_begin_at_zero_are_shifted(tmp_path):
    """As players do: the first stream begins at 0."""
    path = live(film(tmp_path / "v.mp4", (0, 8), None, flags=FRAGMENTS), first=5)
    source = open_video(path, Sampling(1, start=1))
    assert (source.start, seconds(source.frames())) == (1, [6, 7])
