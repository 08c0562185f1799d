"""Videos that are no paths: file objects, iterators of frames, other packages' readers; and what is no video."""

from __future__ import annotations

import collections
import io
import os
import tempfile
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from films import numbered, numbers, retime, sample, write
from PIL import Image

from tieredkv.errors import VideoError
from tieredkv.video import spool as spools
from tieredkv.video.frames import load_frames, open_video
from tieredkv.video.sampling import Sampling

pytestmark = pytest.mark.files

SAMPLINGS = [
    {"fps": 10},
    {"fps": 3, "start": 1.2},
    {"fps": 4, "end": 2.6},
    {"fps": 10, "max_frames": 7},
    {"fps": 2, "start": 0.5, "end": 3.3, "max_frames": 4},
    {"fps": 30},
]


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def frames_of(video, **options) -> list[np.ndarray]:
    return list(open_video(video, Sampling(**options)).frames())


# ---- file objects


@pytest.mark.parametrize("kind", ["bytes", "file", "unnamed"])
def test_a_file_object_is_the_file(steady, temporary, kind):
    """Wherever it was read to: in memory, a file of its own, or a file that has lost its name."""
    if kind == "unnamed":
        video = tempfile.TemporaryFile()  # noqa: SIM115
        video.write(steady.read_bytes())
    else:
        video = io.BytesIO(steady.read_bytes()) if kind == "bytes" else steady.open("rb")
        video.read(1000)
    position = video.tell()
    source, file = open_video(video, Sampling(4, start=0.5)), open_video(steady, Sampling(4, start=0.5))
    assert video.tell() == position
    assert source.sha256() == file.sha256()
    assert source.name == (str(steady) if kind == "file" else "the file given")
    assert numbers(source.frames()) == numbers(file.frames())
    del source
    assert os.listdir(temporary) == []
    video.close()


def test_a_copy_can_be_read_by_this_user_only(steady, temporary):
    source = open_video(io.BytesIO(steady.read_bytes()), Sampling(1))
    (folder,) = temporary.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(list(source.frames())) == 4


def test_errors_name_the_file_object_and_no_temporary_path(steady, temporary):
    cut = steady.read_bytes()[: steady.stat().st_size // 2]
    with pytest.raises(VideoError, match=r"^the file given: decoding stopped at"):
        load_frames(io.BytesIO(cut), Sampling(2))
    with pytest.raises(VideoError, match=r"^the file given: not a readable video file"):
        open_video(io.BytesIO(b"no video"), Sampling(2))
    assert os.listdir(temporary) == []


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (io.StringIO("x"), "open for text: open it in binary mode"),
        (io.BytesIO(b""), "the file given is empty"),
        (b"film.mp4", r"type bytes: give a path as text, or .* io\.BytesIO"),
        (bytearray(b"film.mp4"), "type bytes"),
        ({"a": 1}, "type dict: give a path"),
        (7, "type int: give a path"),
        (None, "type NoneType: give a path"),
    ],
)
def test_other_objects_are_refused(video, message):
    with pytest.raises(VideoError, match=message):
        open_video(video, Sampling(1))


def test_a_closed_file_and_a_pipe_are_refused(steady):
    closed = steady.open("rb")
    closed.close()
    with pytest.raises(VideoError, match=r"the file given cannot be read \(.*closed file"):
        open_video(closed, Sampling(1))
    reading, writing = os.pipe()
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe, pytest.raises(VideoError, match="cannot be read twice"):
        open_video(pipe, Sampling(1))


# ---- paths that are no video


def test_what_is_no_file_of_a_video_is_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty.mp4").touch()
    for path, message in (
        (tmp_path, "is a folder, not a video file"),
        (tmp_path / "fifo", "is not a regular file: save the video as one"),
        (tmp_path / "empty.mp4", "it is empty"),
        ("-", r"stdin\) cannot be a video, which is read more than once: save it as a file"),
        ("https://example.org/film.mp4", r"downloaded only with allow_url=True \(--allow-url\)"),
        ("file:///film.mp4", "only http and https URLs can be opened, not file"),
        ("rtsp://camera/", "only http and https URLs can be opened, not rtsp"),
    ):
        with pytest.raises(VideoError, match=message):
            open_video(path, Sampling(1))


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "tiff", "webp"])
@pytest.mark.parametrize("named", [True, False])
def test_a_still_picture_is_refused(tmp_path, kind, named):
    path = tmp_path / (f"still.{kind}" if named else "still.mp4")
    Image.fromarray(numbered(1)[0]).save(path, kind)
    with pytest.raises(VideoError, match=r"still\.\w+: a still picture, no video: give it in a list, as a picture"):
        open_video(path, Sampling(1))


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_an_animated_picture_is_a_video(tmp_path, kind):
    path = tmp_path / f"moving.{kind}"
    first, *others = [Image.fromarray(picture) for picture in numbered(10)]
    first.save(path, kind, save_all=True, append_images=others, duration=100, loop=0)
    assert numbers(sample(path, 5)) == [0, 2, 4, 6, 8]


# ---- iterators


@pytest.mark.parametrize("options", SAMPLINGS)
@pytest.mark.parametrize("source_fps", [10, None, 3.7])
def test_an_iterator_gives_what_its_list_gives(options, source_fps):
    pictures = numbered(40)
    options = options | {"source_fps": source_fps}
    lasting = len(pictures) / (source_fps or options["fps"])
    if options.get("start", 0) >= lasting:
        pytest.skip("it is over by then")
    source, given = open_video(iter(pictures), Sampling(**options)), open_video(pictures, Sampling(**options))
    for name in ("fps", "start", "expected", "width", "height"):
        assert getattr(source, name) == getattr(given, name), name
    assert source.seconds == pytest.approx(given.seconds)
    shown = list(given.frames())
    for _ in range(2):  # as often as wanted
        assert all((a == b).all() for a, b in zip(source.frames(), shown, strict=True))


def test_an_endless_iterator_is_read_up_to_the_end_asked_for():
    pictures = numbered(40)
    endless = (pictures[min(i, 39)] for i in iter(int, 1))
    read = []

    def counted():
        for picture in endless:
            read.append(1)
            yield picture

    assert len(frames_of(counted(), fps=2, source_fps=10, end=3.0)) == 6
    assert len(read) == 30


def test_only_what_is_sampled_is_kept(monkeypatch):
    kept = []
    keep = spools.Spool.keep
    monkeypatch.setattr(spools.Spool, "keep", lambda self, i, picture: (kept.append(i), keep(self, i, picture)))
    assert len(frames_of(iter(numbered(40)), fps=1, source_fps=10)) == 4
    assert kept == [0, 10, 20, 30, 39]


@pytest.mark.parametrize("form", ["images", "tensors", "floats", "channels first"])
def test_frames_of_an_iterator_have_any_form_of_a_list(form):
    pictures = numbered(6)
    convert = {
        "images": Image.fromarray,
        "tensors": torch.from_numpy,
        "floats": lambda picture: picture / np.float32(255),
        "channels first": lambda picture: picture.transpose(2, 0, 1),
    }[form]
    assert numbers(frames_of(map(convert, pictures), fps=3)) == list(range(6))


def test_the_hash_of_an_iterator_is_that_of_its_frames():
    one, same, other = (open_video(iter(p), Sampling(2)).sha256() for p in (numbered(9), numbered(9), numbered(8)))
    assert one == same != other


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "the video has no frames"),
        ([np.zeros((4, 4), np.uint8)], r"frames have shape \(1, 4, 4\)"),
        ([np.zeros((4, 4, 3), np.int32)], "frames have dtype int32"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], "different sizes"),
        (["a.png"], "frame cannot be read as an image|have dtype|have shape"),
    ],
)
def test_bad_frames_of_an_iterator_are_refused_as_those_of_a_list(frames, message):
    with pytest.raises(VideoError, match=message):
        open_video(iter(frames), Sampling(1))


def test_an_error_of_the_iterator_is_passed_on():
    def failing():
        yield numbered(1)[0]
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        open_video(failing(), Sampling(1))


def test_a_full_disk_is_one_sentence(monkeypatch):
    usage = SimpleNamespace(free=2**20)
    monkeypatch.setattr(spools.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(VideoError, match=r"no room for more than the first 0 frames: lower fps, set end, .* TMPDIR"):
        open_video(iter(numbered(3)), Sampling(1))


# ---- readers


class Reader:
    """Pictures of a file by number, from PyAV."""

    def __init__(self, path, bridge=None) -> None:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            self.rate = float(stream.average_rate)
            decoded = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
        self.times, self.pictures = [time for time, _ in decoded], [picture for _, picture in decoded]
        self.bridge = bridge or (lambda picture: SimpleNamespace(asnumpy=lambda: picture, shape=picture.shape))

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int):
        return self.bridge(self.pictures[index])


class Decord(Reader):
    """What decord's `VideoReader` offers."""

    def get_avg_fps(self) -> float:
        return self.rate


class DecordWithTimes(Decord):
    def get_frame_timestamp(self, indices):
        ends = [*self.times[1:], self.times[-1] + 1 / self.rate]
        return np.array([[self.times[index], ends[index]] for index in indices])


class Torchcodec(Reader):
    """What torchcodec's `VideoDecoder` offers."""

    def __init__(self, path) -> None:
        super().__init__(path, bridge=lambda picture: torch.from_numpy(picture).permute(2, 0, 1))
        end = self.times[-1] + 1 / self.rate
        self.metadata = SimpleNamespace(
            average_fps=self.rate,
            duration_seconds=end - self.times[0],
            begin_stream_seconds=self.times[0],
            end_stream_seconds=end,
            num_frames=len(self.pictures),
        )

    def get_frame_played_at(self, seconds: float):
        """The next one, if none lasts until then."""
        assert self.times[0] <= seconds < self.metadata.end_stream_seconds
        return self.get_frame_at(next(i for i, time in enumerate(self.times) if seconds < time + 1 / self.rate))

    def get_frame_at(self, index: int):
        return SimpleNamespace(data=self[index], pts_seconds=self.times[index])


READERS = {
    "decord": Decord,
    "decord with torch's bridge": lambda path: Decord(path, torch.from_numpy),
    "decord with numpy": lambda path: Decord(path, lambda picture: picture),
    "decord with times": DecordWithTimes,
    "torchcodec": Torchcodec,
}


@pytest.mark.parametrize("options", SAMPLINGS)
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_gives_the_frames_of_its_file(steady, reader, options):
    source, file = open_video(READERS[reader](steady), Sampling(**options)), open_video(steady, Sampling(**options))
    for name in ("fps", "start", "seconds"):
        assert getattr(source, name) == pytest.approx(getattr(file, name)), name
    for name in ("expected", "width", "height"):
        assert getattr(source, name) == getattr(file, name), name
    assert numbers(source.frames()) == numbers(file.frames())
    assert source.sha256() == open_video(READERS[reader](steady), Sampling(1)).sha256()


@pytest.mark.parametrize("reader", ["decord with times", "torchcodec"])
def test_a_reader_that_knows_times_is_sampled_by_them(tmp_path, steady, reader):
    times = [i / 10 for i in range(20)] + [2.0 + i / 2 for i in range(20)]
    path = retime(tmp_path / "vfr.mkv", steady, times)
    source = open_video(READERS[reader](path), Sampling(10, start=1.0, end=6.0))
    assert numbers(source.frames()) == numbers(sample(path, 10, start=1.0, end=6.0))


def test_a_reader_that_fails_is_named(steady):
    reader = Decord(steady)
    source = open_video(reader, Sampling(2))
    reader.bridge = None
    reader.pictures = collections.UserList(reader.pictures)
    del reader.pictures[20:]
    with pytest.raises(VideoError, match=r"the reader given cannot read its frame 20 \(list index out of range"):
        reader.bridge = lambda picture: picture
        list(source.frames())


@pytest.mark.parametrize("rate", [0.0, float("nan"), None])
def test_a_reader_without_a_rate_is_refused(steady, rate):
    reader = Torchcodec(steady)
    reader.metadata.average_fps = rate
    with pytest.raises(VideoError, match=r"states .* frames per second: give the path of the file instead"):
        open_video(reader, Sampling(1))


def test_a_reader_is_over_at_its_end(steady):
    with pytest.raises(VideoError, match=r"nothing between start=4 and 4\.00 s of the reader given"):
        open_video(Decord(steady), Sampling(1, start=4))


def test_an_empty_reader_is_refused(steady):
    reader = Decord(steady)
    reader.pictures = []
    with pytest.raises(VideoError, match="the reader given has no frames"):
        open_video(reader, Sampling(1))


def test_films_of_one_list_are_not_readers(tmp_path):
    film = write(tmp_path / "v.mkv", numbered(4))
    with pytest.raises(VideoError):
        open_video([str(film)], Sampling(1))
