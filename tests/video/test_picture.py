"""Pictures as players show them: stream, colours, shape and orientation."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from films import greys, levels, sample, write

from tieredkv.errors import VideoError
from tieredkv.video.frames import open_video
from tieredkv.video.margins import NO_MARGINS
from tieredkv.video.picture import Geometry, Painter, rotated
from tieredkv.video.sampling import Sampling

pytestmark = pytest.mark.files

# ---- several streams


def several(path: Path, *streams: tuple[int, bool], empty: int | None = None) -> Path:
    """Streams (side, marked as default) of squares: number i has level i, and number `empty` has no frames."""
    with av.open(str(path), "w") as out:
        written = []
        for side, default in streams:
            stream = out.add_stream("mpeg4", rate=5)
            stream.width = stream.height = side
            stream.pix_fmt = "yuv420p"
            stream.disposition = av.stream.Disposition.default.value if default else 0
            written.append(stream)
        for _ in range(10):
            for number, stream in enumerate(written):
                if number != empty:
                    picture = greys(number + 1, stream.height, stream.width)[number]
                    out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for number, stream in enumerate(written):
            if number != empty:
                out.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("streams", "expected"),
    [
        (((32, False), (64, False), (48, False)), 1),
        (((64, False), (32, True)), 1),
        (((32, True), (64, True)), 1),
        (((64, False), (64, False)), 0),
    ],
    ids=["largest", "default before larger", "largest of the defaults", "first of equals"],
)
def test_the_stream_that_ffmpeg_prefers_is_read(tmp_path, streams, expected):
    pictures = sample(several(tmp_path / "several.mkv", *streams), 5)
    assert pictures[0].shape[0] == streams[expected][0]
    assert levels(pictures) == [expected] * 10


def test_a_stream_without_frames_is_skipped(tmp_path):
    assert levels(sample(several(tmp_path / "v.mkv", (32, False), (64, True), empty=1), 5)) == [0] * 10


# ---- pixels that are not square


def anamorphic(path: Path, width: int, height: int, aspect: Fraction) -> Path:
    """A white disc that is round if pixels are `aspect` times as wide as high."""
    x, y = np.meshgrid((np.arange(width) + 0.5) * float(aspect), np.arange(height) + 0.5)
    middle = width * float(aspect) / 2, height / 2
    disc = np.where(np.hypot(x - middle[0], y - middle[1]) < 0.4 * min(middle) * 2, 230, 20).astype(np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=5, options={"qmin": "1", "qmax": "2"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for _ in range(5):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.repeat(disc[..., None], 3, 2), format="rgb24")))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
@pytest.mark.parametrize("aspect", [Fraction(16, 11), Fraction(8, 9), Fraction(1, 2)], ids=str)
def test_a_disc_is_round_and_no_row_is_lost(tmp_path, suffix, aspect):
    source = open_video(anamorphic(tmp_path / f"a.{suffix}", 176, 144, aspect), Sampling(1))
    assert (source.width, source.height) == (round(176 * aspect), 144)
    shown = next(source.frames())[..., 0] > 128
    rows, columns = np.where(shown)
    assert shown.shape == (source.height, source.width)
    assert np.ptp(columns) / np.ptp(rows) == pytest.approx(1, abs=0.04)


def test_square_pixels_of_a_rounded_size_are_not_resampled(tmp_path):
    source = open_video(anamorphic(tmp_path / "a.mp4", 176, 144, Fraction(255, 254)), Sampling(1))
    assert (source.width, source.height) == (176, 144)


def test_pixels_of_an_impossible_shape_count_as_square(tmp_path):
    path = anamorphic(tmp_path / "a.mp4", 176, 144, Fraction(3, 2))
    stored = path.read_bytes()
    at = stored.index(b"pasp") + 4
    path.write_bytes(stored[:at] + struct.pack(">2I", 60000, 1) + stored[at + 8 :])
    source = open_video(path, Sampling(1))
    assert (source.width, source.height) == (176, 144)


# ---- the display matrix

CORNER = np.zeros((4, 6, 3), np.uint8)
CORNER[0, 0], CORNER[0, 5] = 255, 128


def matrix(a: float, b: float, c: float, d: float) -> tuple[int, ...]:
    return (round(a * 65536), round(b * 65536), 0, round(c * 65536), round(d * 65536), 0, 0, 0, 1 << 30)


def filtered(picture: np.ndarray, *filters: tuple[str, str]) -> np.ndarray:
    """A picture after FFmpeg's own filters."""
    graph = av.filter.Graph()
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    frame.time_base = Fraction(1, 10)
    source = graph.add_buffer(width=frame.width, height=frame.height, format="rgb24", time_base=frame.time_base)
    graph.link_nodes(source, *(graph.add(*one) for one in filters), graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull().to_ndarray(format="rgb24")


@pytest.mark.parametrize(
    ("numbers", "filters"),
    [
        ((1, 0, 0, 1), ()),
        ((-1, 0, 0, 1), (("hflip", ""),)),
        ((1, 0, 0, -1), (("vflip", ""), ("hflip", ""), ("hflip", ""))),  # PyAV 17 reads no rows from below
        ((-1, 0, 0, -1), (("vflip", ""), ("hflip", ""))),
        ((0, 1, -1, 0), (("transpose", "clock"),)),
        ((0, -1, 1, 0), (("transpose", "cclock"),)),
        ((0, 1, 1, 0), (("transpose", "cclock_flip"),)),
        ((0, -1, -1, 0), (("transpose", "clock_flip"),)),
        ((0, 0, 0, 0), ()),
    ],
    ids=["none", "mirror", "flip", "half turn", "right", "left", "transpose", "anti-transpose", "damaged"],
)
def test_the_display_matrix_rotates_and_mirrors_as_ffmpeg_does(numbers, filters):
    expected = filtered(CORNER, *filters) if filters else CORNER
    assert np.array_equal(rotated(CORNER, matrix(*numbers)), expected)


@pytest.mark.parametrize("degrees", [30, 135, -45])
def test_an_angle_other_than_a_quarter_turn_keeps_the_size_with_black_corners(degrees):
    picture = np.full((48, 64, 3), 40, np.uint8)
    picture[10:20, 40:52] = 220
    angle = np.radians(degrees)
    got = rotated(picture, matrix(np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)))
    expected = filtered(picture, ("rotate", f"{degrees}*PI/180"))
    assert got.shape == picture.shape
    assert np.abs(got.astype(int) - expected).mean() < 6
    assert got[0, 0].max() == 0


@pytest.mark.parametrize("fps", [10, 0.4], ids=["linear", "seeking"])
def test_a_mirrored_file_is_mirrored(tmp_path, fps):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :16] = 220
    path = write(tmp_path / "mirrored.mp4", [picture] * 100, g="5")
    stored = path.read_bytes()
    plain, mirrored = (struct.pack(">9i", *matrix(side, 0, 0, 1)) for side in (1, -1))
    at = stored.index(plain, stored.index(b"tkhd"))
    path.write_bytes(stored[:at] + mirrored + stored[at + 36 :])
    for shown in sample(path, fps):
        assert np.abs(shown.astype(int) - picture[:, ::-1]).mean() < 10


# ---- margins that the container crops


def grown(data: bytes, parents: tuple[bytes, ...], by: int) -> bytes:
    """An MP4 with `by` added to the sizes of nested boxes, each the first of its kind after the one before."""
    result, at = bytearray(data), 0
    for parent in parents:
        at = result.index(parent, at)
        result[at - 4 : at] = struct.pack(">I", struct.unpack(">I", result[at - 4 : at])[0] + by)
    return bytes(result)


def cornered() -> np.ndarray:
    """48 x 64: a white margin of 8 rows and 16 columns, dark inside."""
    picture = np.full((48, 64, 3), 230, np.uint8)
    picture[8:40, 16:48] = 20
    return picture


def test_only_the_clean_aperture_is_shown(tmp_path):
    """32 x 24, 4 to the right of the centre and 2 up."""
    path = write(tmp_path / "v.mp4", [cornered()] * 10)
    data = path.read_bytes()
    entry = data.index(b"avc1", data.index(b"stsd")) - 4
    end = entry + struct.unpack(">I", data[entry : entry + 4])[0]
    clap = struct.pack(">I4s8i", 40, b"clap", 32, 1, 24, 1, 4, 1, -2, 1)
    path.write_bytes(
        grown(data[:end] + clap + data[end:], (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"), 40)
    )
    source = open_video(path, Sampling(1))
    assert (source.width, source.height) == (32, 24)
    bright = next(source.frames())[..., 0] > 128
    assert bright[:, -4:].all()  # columns 48 to 51 of what is stored
    assert bright[:4].sum() == 4 * 4  # row 10 on: inside
    assert not bright[:, :28].any()


def test_matroskas_crop_is_applied(tmp_path):
    path = write(tmp_path / "v.mkv", [cornered()] * 10, format="matroska", pipe=True, bf="0")
    data = path.read_bytes()
    crop = b"".join(bytes((0x54, kind, 0x81, side)) for kind, side in ((0xBB, 8), (0xAA, 8), (0xCC, 16), (0xDD, 12)))
    video = data.index(b"\xb0\x81\x40\xba\x81\x30") - 2  # the size of the pictures, in the element Video
    stored = bytearray(data[: video + 2] + crop + data[video + 2 :])
    assert stored[video] == 0xE0
    stored[video + 1] += len(crop)
    tracks = stored.rindex(b"\x16\x54\xae\x6b", 0, video) + 4
    track = tracks + 9 - stored[tracks].bit_length()
    track += 6 if stored[track] == 0xBF else 0  # a checksum, which FFmpeg does not look at
    assert stored[track] == 0xAE
    for at in (tracks, track + 1):
        size = 9 - stored[at].bit_length()
        stored[at : at + size] = (int.from_bytes(stored[at : at + size], "big") + len(crop)).to_bytes(size, "big")
    path.write_bytes(stored)
    source = open_video(path, Sampling(1))
    assert (source.width, source.height) == (36, 32)
    bright = next(source.frames())[..., 0] > 128
    assert bright[:, 33:].all()
    assert not bright[:, :31].any()


# ---- colours

COLOURS = np.array([(220, 30, 30), (30, 200, 30), (30, 30, 220), (230, 230, 230)], float)
WEIGHTS = {"bt709": (1, 0.2126, 0.0722), "smpte170m": (6, 0.299, 0.114), "bt2020nc": (9, 0.2627, 0.0593)}
"""The matrix's number in FFmpeg, and the weights of red and blue in the brightness."""


def coloured(path: Path, red: float, blue: float, full: bool, pixels: str, state: int | None, codec="ffv1") -> Path:
    """`COLOURS` side by side, by the formula of a matrix. state: number of the matrix that frames state."""
    bits = 10 if "10" in pixels else 8
    r, g, b = COLOURS.T / 255
    y = red * r + (1 - red - blue) * g + blue * b
    differences = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    scale, middle = 2 ** (bits - 8), 2 ** (bits - 1)
    most = 2**bits - 1
    stored = [most * y, *(middle + most * d for d in differences)]
    if not full:
        stored = [scale * (16 + 219 * y), *(scale * (128 + 224 * d) for d in differences)]
    rows = [np.repeat(np.round(plane), width // 4) for plane, width in zip(stored, (64, 32, 32), strict=True)]
    planes = [np.tile(row, (height, 1)).reshape(-1) for row, height in zip(rows, (48, 24, 24), strict=True)]
    flat = np.concatenate(planes).astype("<u2" if bits > 8 else np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        stream.codec_context.color_range = 2 if full else 1
        if state is not None:
            stream.codec_context.colorspace = state
        for _ in range(5):
            frame = av.VideoFrame(64, 48, pixels)
            at = 0
            for plane in frame.planes:
                size = plane.height * plane.width * flat.itemsize
                rows_of = flat.view(np.uint8)[at : at + size].reshape(plane.height, -1)
                padded = np.zeros((plane.height, plane.line_size), np.uint8)
                padded[:, : rows_of.shape[1]] = rows_of
                plane.update(padded.tobytes())
                at += size
            frame.color_range = 2 if full else 1
            if state is not None:
                frame.colorspace = state
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def colour_error(path: Path) -> float:
    """The largest error of any of `COLOURS`."""
    return float(np.abs(sample(path, 1)[0][24, 8::16] - COLOURS).max())


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv420p10le"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_colours_follow_the_stated_matrix_and_range(tmp_path, name, full, pixels):
    number, red, blue = WEIGHTS[name]
    assert colour_error(coloured(tmp_path / "v.mkv", red, blue, full, pixels, number)) <= 5


def test_without_a_matrix_colours_follow_bt601_as_in_ffmpeg(tmp_path):
    _, red, blue = WEIGHTS["smpte170m"]
    assert colour_error(coloured(tmp_path / "v.mkv", red, blue, False, "yuv420p", None)) <= 5


def test_reserved_colour_properties_count_as_unspecified():
    """FFmpeg's scaler refuses them, players do not."""
    frame = av.VideoFrame.from_ndarray(np.full((72, 64), 128, np.uint8), format="yuv420p")
    frame.colorspace = frame.color_trc = frame.color_primaries = 3
    assert np.ptp(Painter(Path("v.mkv"), Geometry(Fraction(1), NO_MARGINS)).paint(frame)) <= 1


def test_jpeg_pictures_have_full_range(tmp_path):
    _, red, blue = WEIGHTS["smpte170m"]
    assert colour_error(coloured(tmp_path / "v.mkv", red, blue, True, "yuvj420p", None, "mjpeg")) <= 8


@pytest.mark.parametrize("pixels", ["bgra", "gbrp10le"])
def test_pictures_stored_in_rgb_are_unchanged(tmp_path, pixels):
    picture = np.repeat(np.tile(COLOURS.astype(np.uint8), (48, 1, 1)), 16, 1)
    assert colour_error(write(tmp_path / "v.mkv", [picture] * 5, "ffv1", pixels=pixels)) <= 1


def test_a_matrix_that_cannot_be_converted_is_an_error_that_names_it(tmp_path):
    _, red, blue = WEIGHTS["bt2020nc"]
    path = coloured(tmp_path / "v.mkv", red, blue, False, "yuv420p10le", 10)
    with pytest.raises(VideoError, match=r"v\.mkv: FFmpeg cannot convert its colours \(matrix 10\): re-encode"):
        open_video(path, Sampling(1))
