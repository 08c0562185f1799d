"""Frames of a video sampled by time, one at a time, from a file or from arrays."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

import numpy as np
import torch

from tieredkv.errors import VideoError
from tieredkv.memory.limits import check_host_memory
from tieredkv.video.arrays import ArraySource
from tieredkv.video.local_file import check_file_object, is_file_object, local_file
from tieredkv.video.paths import check_path
from tieredkv.video.readers import ReaderSource, is_reader
from tieredkv.video.sampling import FileSource, Sampling, Tick
from tieredkv.video.spool import spool
from tieredkv.video.subtitles import Cue, read_cues, shown_during

_start = attrgetter("start")


class VideoSource(Protocol):
    """Frames at an even rate: frame i shows the video at `start + i / fps` seconds.

    Times are those that players show: 0 is where the first stream of a file begins, which may be audio.
    """

    name: str
    """For messages: the path, or "the frames given"."""
    height: int
    width: int
    """Size of every frame, with square pixels, rotated upright."""
    fps: float
    """Frames per second of video; lower than requested where `max_frames` spreads them."""
    start: float
    """Time of the first frame in seconds; later than requested if the picture begins later."""
    expected: int
    """Number of frames: exact for arrays, for a file according to the length it states, which may be wrong."""
    seconds: float | None
    """Length of the sampled span; None: unknown."""
    cues: tuple[Cue, ...]
    """Subtitles, of all of the video, if `Sampling.subtitles` names some."""
    damaged: tuple[tuple[float, float], ...]
    """With `skip_damaged`: from when to when nothing could be read, within the sampled span. Known once all frames were
    read."""

    def frames(self, tick: Tick | None = None, first: int = 0) -> Iterator[np.ndarray]:
        """A new iterator over the frames from number `first` on, uint8 `(H, W, 3)` RGB, for any thread.

        A frame may be the user's own array or the same as the one before: do not write to it. Nothing stays open when
        the iterator ends, fails or is closed. Raises `VideoError`, and what `tick` raises.
        """

    def sha256(self, check: Callable[[], None] | None = None) -> str:
        """Hash in hexadecimal: of a file's bytes, or of arrays as uint8 and their shape.

        check: called repeatedly; may raise to stop.
        """


@dataclass(frozen=True, slots=True)
class Sampled:
    """What is known about a video before it is decoded."""

    frames: int
    height: int
    width: int
    fps: float
    start: float
    """Time of the first frame, in seconds."""
    seconds: float
    """Seconds from the first frame to the end."""
    max_pixels: int | None = None
    """As in `Sampling`."""
    cues: tuple[Cue, ...] = ()
    """Subtitles that are shown while the video lasts, in order of time."""

    def cues_of(self, step: int, step_frames: int) -> tuple[Cue, ...]:
        """Those that begin while a temporal step is shown; of the first step, also those that began before."""
        begin, end = (self.start + frame / self.fps for frame in (step * step_frames, (step + 1) * step_frames))
        first = 0 if step == 0 else bisect_left(self.cues, begin, key=_start)
        return self.cues[first : bisect_left(self.cues, end, key=_start)]

    def times(self, step: int, step_frames: int, frames: int | None = None) -> list[float]:
        """Times in seconds of a temporal step's frames. frames: of the whole video, where it differs from `frames`."""
        first = step * step_frames
        last = min(first + step_frames, self.frames if frames is None else frames)
        return [self.start + index / self.fps for index in range(first, last)]

    @staticmethod
    def of(source: VideoSource, max_pixels: int | None = None) -> Sampled:
        """What is known about an opened video."""
        seconds = source.expected / source.fps if source.seconds is None else source.seconds
        cues = shown_during(source.cues, source.start, source.start + seconds)
        size = source.height, source.width
        return Sampled(source.expected, *size, source.fps, source.start, seconds, max_pixels, cues)


@dataclass(frozen=True, slots=True)
class Frames:
    """Frames at an even rate: frame i shows the video at `i / fps` seconds."""

    pixels: np.ndarray
    """uint8, `(T, H, W, 3)`, RGB."""
    fps: float


def open_video(video: Any, sampling: Sampling, check: Callable[[], None] | None = None) -> VideoSource:
    """The frames of `video` that `sampling` selects; its `fps` must be given.

    video: a path; a binary file object, read from its beginning; frames: a list of PIL images, or an array or tensor
    `(T, H, W, 3)` or `(T, 3, H, W)`, uint8, or floats in [0, 1]; an iterator of such frames, which is read to its end
    or to that of the sampling; a reader of decord or torchcodec. Decodes the first frames of a file; reads all of its
    packets only where it does not state how long its picture is. `check` is called now and then and may raise to stop.
    Raises `VideoError`.
    """
    check_video(video)
    if sampling.fps is None:
        raise VideoError("fps=None is not valid: give frames per second.")
    source = _opened(video, sampling, check)
    if sampling.subtitles is not None:
        source.cues = tuple(read_cues(sampling.subtitles, video))
    return source


def _opened(video: Any, sampling: Sampling, check: Callable[[], None] | None) -> VideoSource:
    if isinstance(video, str | os.PathLike):
        return FileSource(video, sampling, check)
    if is_file_object(video):
        return FileSource(local_file(video, check), sampling, check)
    if is_reader(video):
        return ReaderSource(video, sampling)
    if isinstance(video, Iterator):
        return ArraySource(spool(video, sampling, check), sampling)
    return ArraySource(video, sampling)


def load_frames(video: Any, sampling: Sampling) -> Frames:
    """All frames of `video` in one array; arguments as for `open_video`.

    Raises `VideoError`, and `BudgetError` if they do not fit in memory.
    """
    source = open_video(video, sampling)
    what = f"{source.name}: {source.expected:,} frames of {source.width}x{source.height} at fps={source.fps:g}"
    size = source.expected * source.width * source.height * 3
    if isinstance(source, FileSource):  # the frames, and the array they are stacked in
        check_host_memory(2 * size, what, "lower fps or max_frames, or make the video smaller")
    else:
        check_host_memory(size, what, "lower fps, or check source_fps")
    return Frames(np.stack(list(source.frames())), source.fps)


def check_video(video: Any) -> None:
    """Raise `VideoError` unless `video` can be one, see `open_video`; no more than a byte of a file is read."""
    if isinstance(video, str | os.PathLike):
        check_path(video)
    elif isinstance(video, bytes | bytearray | memoryview):
        raise VideoError("video is of type bytes: give a path as text, or the content of a file as io.BytesIO(...).")
    elif is_file_object(video):
        check_file_object(video)
    elif not (isinstance(video, torch.Tensor | np.ndarray | Sequence | Iterator) or is_reader(video)):
        raise VideoError(
            f"video is of type {type(video).__name__}: give a path, a list of PIL images, or an array (T, H, W, 3)."
        )
    elif isinstance(video, Sequence) and video and all(isinstance(one, str | os.PathLike) for one in video):
        raise VideoError(f"video is a list of {len(video)} paths, where one video is expected: give one path.")


def states_its_rate(video: Any) -> bool:
    """Whether times are known of the video itself: of a file, or a reader. Of frames, the user gives their rate."""
    return isinstance(video, str | os.PathLike) or is_file_object(video) or is_reader(video)
