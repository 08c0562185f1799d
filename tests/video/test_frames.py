"""Frames sampled by time, from files in several formats and from arrays."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tieredkv.errors import VideoError
from tieredkv.video.frames import load_frames, open_video
from tieredkv.video.sampling import Sampling


def write(path: Path, times: list[float], size: int = 64, codec: str = "libx264", **container: str) -> Path:
    """A video whose frame i is a uniform grey of brightness 10 + 10 * i, shown from times[i] on."""
    with av.open(str(path), "w", **container) as output:
        stream = output.add_stream(codec, rate=1000)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), grey(i), np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def grey(index: int) -> int:
    return 10 + 10 * index


def shown(frames) -> list[int]:
    """The index of the written frame that each sampled frame shows, by its brightness."""
    return [round((float(picture.mean()) - 10) / 10) for picture in frames.pixels]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "avi", "ts", "webm"])
def test_all_containers_give_the_same_frames(tmp_path, suffix):
    codec = {"webm": "libvpx-vp9", "avi": "mpeg4"}.get(suffix, "libx264")
    path = tmp_path / f"video.{suffix}"
    if suffix == "avi":  # no timestamps of its own: a constant rate
        with av.open(str(path), "w") as output:
            stream = output.add_stream(codec, rate=10)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            for i in range(20):
                picture = np.full((64, 64, 3), grey(i), np.uint8)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            output.mux(stream.encode())
    else:
        write(path, [i / 10 for i in range(20)], codec=codec)
    frames = load_frames(path, Sampling(fps=2.5))
    assert frames.pixels.shape[1:] == (64, 64, 3)
    assert shown(frames)[:5] == [0, 4, 8, 12, 16]


def test_a_variable_rate_is_sampled_by_time_not_by_count(tmp_path):
    """The frame shown at each sampling time, although half of the frames are in the first second."""
    times = [i / 10 for i in range(10)] + [1 + i for i in range(10)]
    frames = load_frames(write(tmp_path / "vfr.mkv", times), Sampling(fps=2))
    assert shown(frames)[:8] == [0, 5, 10, 10, 11, 11, 12, 12]


def test_a_rate_above_the_files_repeats_frames(tmp_path):
    frames = load_frames(write(tmp_path / "slow.mp4", [0.0, 1.0, 2.0]), Sampling(fps=4))
    assert shown(frames)[:8] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_max_frames_are_spread_over_the_whole_video(tmp_path):
    """The video ends at 1.901 s, a millisecond after its last frame."""
    frames = load_frames(write(tmp_path / "v.mp4", [i / 10 for i in range(20)]), Sampling(fps=10, max_frames=4))
    assert shown(frames) == [0, 4, 9, 14]
    assert frames.fps == pytest.approx(4 / 1.901)


def test_arrays_are_resampled_to_another_rate():
    video = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1).repeat(3, axis=3)
    frames = load_frames(video, Sampling(fps=2, source_fps=5))
    assert frames.pixels[:, 0, 0, 0].tolist() == [0, 2, 5, 7, 10, 12, 15, 17]


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\): give \(T, H, W, 3\)"),
        (np.zeros((3, 8, 8, 4), np.uint8), r"shape \(3, 8, 8, 4\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no frames"),
        (np.zeros((3, 8, 8, 3), np.int64), "dtype int64"),
        (np.full((3, 8, 8, 3), 2.0), r"must lie in \[0, 1\]"),
        (np.full((3, 8, 8, 3), np.nan), r"must lie in \[0, 1\]"),
        ([], "no frames"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)], "different sizes"),
        (42, "video is of type int"),
    ],
    ids=["3 axes", "4 channels", "none", "int64", "too bright", "nan", "empty list", "sizes", "number"],
)
def test_arrays_that_are_no_video_are_refused(video, message):
    with pytest.raises(VideoError, match=message):
        load_frames(video, Sampling(fps=1))


@pytest.mark.parametrize("fps", [0, -2, float("nan"), float("inf"), "2", True, None])
def test_an_invalid_rate_is_refused(fps):
    with pytest.raises(VideoError, match=r"fps=.* is not valid"):
        load_frames(np.zeros((3, 8, 8, 3), np.uint8), Sampling(fps=fps))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(VideoError, match=r"gone\.mp4: no such file"):
        load_frames(tmp_path / "gone.mp4", Sampling(fps=1))


def test_a_folder_is_not_a_video(tmp_path):
    with pytest.raises(VideoError, match="is a folder"):
        load_frames(tmp_path, Sampling(fps=1))


@pytest.mark.parametrize("content", [b"", b"not a video at all, just text" * 40], ids=["empty", "text"])
def test_a_file_that_is_not_a_video_is_refused(tmp_path, content):
    path = tmp_path / "fake.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"fake\.mp4: not a readable video file"):
        load_frames(path, Sampling(fps=1))


def test_a_file_with_sound_only_is_refused(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(VideoError, match="no video stream"):
        load_frames(path, Sampling(fps=1))


def test_a_header_without_frames_is_refused(tmp_path):
    path = tmp_path / "empty.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        output.start_encoding()
    with pytest.raises(VideoError, match=r"empty\.mkv"):
        load_frames(path, Sampling(fps=1))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_an_error_with_the_time_where_it_stops(tmp_path, suffix, share):
    """Without its header, which may come last (mp4), a file is unreadable; otherwise the error has the last time."""
    noise = np.random.default_rng(0)
    path = tmp_path / f"cut.{suffix}"
    options = {"options": {"movflags": "faststart"}} if suffix == "mp4" else {}
    with av.open(str(path), "w", **options) as output:
        stream = output.add_stream("libx264", rate=10, options={"g": "10"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(200):
            picture = noise.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    if suffix == "ts":  # a transport stream states no length: what is there is a shorter, valid video
        assert len(load_frames(path, Sampling(fps=2)).pixels) <= 40 * share + 1
        return
    with pytest.raises(VideoError, match=r"cut\.\w+: (decoding stopped at [\d.]+ s|not a readable video file)"):
        load_frames(path, Sampling(fps=2))


def test_a_truncated_file_with_sound_is_an_error_too(tmp_path):
    """Matroska states each stream's length in a tag; the length of the file includes the sound."""
    path, noise = tmp_path / "talk.mkv", np.random.default_rng(0)
    with av.open(str(path), "w") as output:
        video = output.add_stream("libx264", rate=10)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        sound = output.add_stream("aac", rate=8000, layout="mono")
        for i in range(100):
            picture = noise.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            output.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.float32), format="fltp", layout="mono")
            samples.rate, samples.pts = 8000, i * 800
            output.mux(sound.encode(samples))
        output.mux(video.encode())
        output.mux(sound.encode())
    assert len(load_frames(path, Sampling(fps=2)).pixels) == 20
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match=r"talk\.mkv: decoding stopped at [45]\.\d+ s"):
        load_frames(path, Sampling(fps=2))


def test_a_picture_that_changes_size_is_an_error_with_the_time(tmp_path):
    path = tmp_path / "joined.ts"
    parts = [
        write(tmp_path / f"{size}.ts", [start + i / 10 for i in range(20)], size=size)
        for size, start in ((64, 0), (96, 2))
    ]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(VideoError, match=r"joined\.ts: the picture changes from 64x64 to 96x96 at [\d.]+ s"):
        load_frames(path, Sampling(fps=5))


def test_half_precision_tensors_are_accepted():
    import torch

    video = torch.rand(3, 8, 8, 3)
    half = load_frames(video.bfloat16(), Sampling(fps=1)).pixels.astype(int)
    assert np.abs(half - load_frames(video, Sampling(fps=1)).pixels).max() <= 2


def test_a_name_that_no_file_can_have_is_a_missing_file():
    with pytest.raises(VideoError, match="no such file"):
        load_frames("what happens in this film ? " * 20, Sampling(fps=1))


def test_a_video_filmed_upright_is_rotated(tmp_path):
    """A display matrix of 90 degrees clockwise, as phones write it: the left of the stored picture is shown on top."""
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height = 96, 64
        stream.pix_fmt = "yuv420p"
        picture = np.zeros((64, 96, 3), np.uint8)
        picture[:, :48] = 220
        for _ in range(10):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())

    def matrix(*values: int) -> bytes:
        return b"".join(value.to_bytes(4, "big", signed=True) for value in values)

    one = 0x10000
    stored = path.read_bytes()
    track = stored.index(b"tkhd")
    at = stored.index(matrix(one, 0, 0, 0, one, 0, 0, 0, 0x40000000), track)
    rotation = matrix(0, one, 0, -one, 0, 0, 64 * one, 0, 0x40000000)
    path.write_bytes(stored[:at] + rotation + stored[at + len(rotation) :])
    pixels = load_frames(path, Sampling(fps=5)).pixels
    assert pixels.shape[1:] == (96, 64, 3)
    assert pixels[0, :40].mean() > 180
    assert pixels[0, 56:].mean() < 40


def test_a_tag_in_another_encoding_is_no_error(tmp_path):
    path = tmp_path / "old.mkv"
    with av.open(str(path), "w") as output:
        output.metadata["title"] = "XXXXXX"
        stream = output.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(5):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        output.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"XXXXXX", b"caf\xe9\xe9\xe9"))
    assert len(load_frames(path, Sampling(fps=10)).pixels) == 5


def test_a_source_rate_that_would_fill_the_memory_is_refused():
    from tieredkv.errors import BudgetError

    video = np.zeros((100, 64, 64, 3), np.uint8)
    assert open_video(video, Sampling(fps=2, source_fps=1e-6)).expected == 200_000_000
    with pytest.raises(BudgetError, match="check source_fps"):
        load_frames(video, Sampling(fps=2, source_fps=1e-6))


def counting(count: int) -> np.ndarray:
    """Frames of one pixel whose value is their number."""
    return np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1).repeat(3, axis=3)


def counted(source) -> list[int]:
    return [int(picture[0, 0, 0]) for picture in source.frames()]


def test_a_span_of_an_array_is_sampled_from_its_start_to_before_its_end():
    source = open_video(counting(20), Sampling(fps=2, source_fps=4, start=1, end=3))
    assert (source.expected, source.seconds) == (4, 2)
    assert counted(source) == [4, 6, 8, 10]


@pytest.mark.parametrize("source_fps", [None, 5])
def test_max_frames_are_spread_over_an_array(source_fps):
    source = open_video(counting(20), Sampling(fps=5, source_fps=source_fps, max_frames=4))
    assert (source.expected, source.fps) == (4, 1)
    assert counted(source) == [0, 5, 10, 15]


def test_a_start_past_an_array_is_an_error_with_its_length():
    with pytest.raises(VideoError, match=r"start=5 is past the end of the frames given, which last 4\.00 s"):
        open_video(counting(8), Sampling(fps=2, start=5))


def test_values_out_of_range_are_an_error_at_their_frame():
    video = np.zeros((3, 8, 8, 3), np.float32)
    video[2] = 1.5
    frames = open_video(video, Sampling(fps=1)).frames()
    next(frames)
    next(frames)
    with pytest.raises(VideoError, match=r"must lie in \[0, 1\]"):
        next(frames)


def test_images_are_converted_one_at_a_time(tmp_path):
    """Opened images are read only when their frame is asked for."""
    from PIL import Image

    Image.new("L", (8, 6), 7).save(tmp_path / "grey.png")
    images = [Image.open(tmp_path / "grey.png") for _ in range(3)]
    source = open_video(images, Sampling(fps=1))
    assert (source.height, source.width) == (6, 8)
    frames = source.frames()
    assert next(frames).tolist() == np.full((6, 8, 3), 7).tolist()
    assert images[2].fp is not None  # which reading the picture closes
    for image in images:
        image.close()


def test_frames_of_an_array_tick_with_the_seconds_so_far():
    seen: list[float] = []
    assert len(list(open_video(counting(6), Sampling(fps=2)).frames(seen.append))) == 6
    assert seen == [0, 0.5, 1, 1.5, 2, 2.5]


def test_the_hash_of_arrays_depends_on_their_pixels():
    """The same for every type; different for other frames or another shape."""
    import torch

    video = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
    same = [video, list(video), torch.from_numpy(video).permute(0, 3, 1, 2), video / 255]
    assert len({open_video(form, Sampling(fps=1)).sha256() for form in same}) == 1
    other = [video, video[:3], video.reshape(4, 8, 6, 3)]
    assert len({open_video(form, Sampling(fps=1)).sha256() for form in other}) == 3


@pytest.mark.parametrize(
    "values",
    [
        {"fps": 0},
        {"fps": 1e-7},
        {"fps": 1001},
        {"fps": 2, "source_fps": "30"},
        {"max_frames": 0},
        {"max_frames": 2.5},
        {"max_frames": True},
        {"max_pixels": 255},
        {"max_pixels": 1e6},
        {"start": -1},
        {"start": 3, "end": 3},
        {"end": float("inf")},
    ],
    ids=str,
)
def test_a_sampling_that_no_video_allows_is_refused_on_construction(values):
    name = list(values)[-1]
    with pytest.raises(VideoError, match=f"^{name}=.* is not valid: give "):
        Sampling(**values)


def test_a_sampling_lists_the_values_that_are_not_defaults():
    assert Sampling().given() == Sampling(start=0).given() == []
    assert Sampling(fps=2, end=3).given() == ["fps", "end"]
