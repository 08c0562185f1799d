"""Frames of a video sampled by time, one at a time, from a file or from arrays."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from tieredkv.errors import VideoError
from tieredkv.memory.limits import check_host_memory
from tieredkv.video.paths import check_path
from tieredkv.video.sampling import FileSource, Sampling, Tick


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

    def times(self, step: int, step_frames: int, frames: int | None = None) -> list[float]:
        """Times in seconds of a temporal step's frames. frames: of the whole video, where it differs from `frames`."""
        first = step * step_frames
        last = min(first + step_frames, self.frames if frames is None else frames)
        return [self.start + index / self.fps for index in range(first, last)]

    @staticmethod
    def of(source: VideoSource, max_pixels: int | None = None) -> Sampled:
        """What is known about an opened video."""
        seconds = source.expected / source.fps if source.seconds is None else source.seconds
        return Sampled(source.expected, source.height, source.width, source.fps, source.start, seconds, max_pixels)


@dataclass(frozen=True, slots=True)
class Frames:
    """Frames at an even rate: frame i shows the video at `i / fps` seconds."""

    pixels: np.ndarray
    """uint8, `(T, H, W, 3)`, RGB."""
    fps: float


def open_video(video: Any, sampling: Sampling, check: Callable[[], None] | None = None) -> VideoSource:
    """The frames of `video` that `sampling` selects; its `fps` must be given.

    video: a path, or frames: a list of PIL images, or an array or tensor `(T, H, W, 3)` or `(T, 3, H, W)`, uint8, or
    floats in [0, 1]. Decodes the first frames of a file; reads all of its packets only where it does not state how long
    its picture is, calling `check` now and then, which may raise to stop. Raises `VideoError`.
    """
    check_video(video)
    if sampling.fps is None:
        raise VideoError("fps=None is not valid: give frames per second.")
    if isinstance(video, str | Path):
        return FileSource(Path(video), sampling, check)
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
    """Raise `VideoError` unless `video` is frames or the path of a file; no more than a byte is read."""
    if isinstance(video, bytes | bytearray) or not isinstance(video, str | Path | torch.Tensor | np.ndarray | Sequence):
        raise VideoError(
            f"video is of type {type(video).__name__}: give a path, a list of PIL images, or an array (T, H, W, 3)."
        )
    if isinstance(video, str | Path):
        check_path(video)
    elif isinstance(video, Sequence) and video and all(isinstance(one, str | Path) for one in video):
        raise VideoError(f"video is a list of {len(video)} paths: give one; each video is a session of its own.")


class ArraySource:
    """Samples frames of an array, a tensor or a list of images, and converts each when it is asked for."""

    name = "the frames given"
    damaged: tuple[tuple[float, float], ...] = ()

    def __init__(self, video: Any, sampling: Sampling) -> None:
        """Keeps `video` without a copy. Raises `VideoError` if its type, shape or dtype is not that of a video.

        sampling: with `fps`.
        """
        self._video = video
        if isinstance(video, torch.Tensor | np.ndarray):
            shape, dtype = tuple(video.shape), _dtype(video)
        else:
            shape, dtype = _form_of_list(video)
        self._lock = threading.Lock()  # an image or a lazy reader must not be read by two threads at once
        self._channels_first = len(shape) == 4 and shape[-1] != 3 and shape[1] == 3
        if len(shape) != 4 or (shape[-1] != 3 and not self._channels_first):
            raise VideoError(f"frames have shape {shape}: give (T, H, W, 3) or (T, 3, H, W).")
        if 0 in shape:
            raise VideoError(f"the video has no frames or empty ones: its shape is {shape}.")
        _check_dtype(dtype)
        self._count = shape[0]
        self.height, self.width = shape[2:] if self._channels_first else shape[1:3]
        assert sampling.fps is not None
        start, end, fps = sampling.start, sampling.end, sampling.fps
        self._source_fps = fps if sampling.source_fps is None else sampling.source_fps
        length = self._count / self._source_fps
        if start >= length:
            raise VideoError(f"start={start:g} is past the end of the frames given, which last {length:.2f} s.")
        self.start = start
        self.seconds: float | None = (length if end is None else min(end, length)) - start
        self.fps, self.expected = sampling.spread(max(1, math.ceil(self.seconds * fps - 1e-9)), self.seconds)

    def frames(self, tick: Tick | None = None, first: int = 0) -> Iterator[np.ndarray]:
        """The frames from number `first` on. Raises `VideoError` at a frame with values out of range."""
        for n in range(first, self.expected):
            if tick is not None:
                tick(n / self.fps)
            index = int(self.start * self._source_fps + n * self._source_fps / self.fps + 1e-6)
            yield self._picture(min(index, self._count - 1))

    def sha256(self, check: Callable[[], None] | None = None) -> str:
        """Hash of all frames as uint8 `(T, H, W, 3)`, whatever their type, and of that shape."""
        digest = hashlib.sha256(repr((self._count, self.height, self.width, 3)).encode())
        for index in range(self._count):
            if check is not None:
                check()
            digest.update(self._picture(index).data)
        return digest.hexdigest()

    def _picture(self, index: int) -> np.ndarray:
        with self._lock:
            picture = _as_array(self._video[index])
        if self._channels_first and picture.ndim == 3:
            picture = picture.transpose(1, 2, 0)
        if picture.shape != (self.height, self.width, 3):
            raise VideoError("the frames have different sizes: resize them to one size.")
        if np.issubdtype(picture.dtype, np.floating):
            if not (np.isfinite(picture).all() and picture.min() >= 0 and picture.max() <= 1):
                raise VideoError("floating point frames must lie in [0, 1]: scale them, or give uint8.")
            picture = (picture * 255).round().astype(np.uint8)
        return np.ascontiguousarray(picture)


def _form_of_list(video: Sequence[Any]) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a list of frames as if stacked; does not read images."""
    if len(video) == 0:
        raise VideoError("the video has no frames: give at least one.")
    shapes, dtypes = set(), set()
    for frame in video:
        if isinstance(frame, Image.Image):
            shapes.add((frame.height, frame.width, 3))
            dtypes.add("uint8")
        else:
            if not isinstance(frame, torch.Tensor | np.ndarray):
                frame = _as_array(frame)
            shapes.add(tuple(frame.shape))
            dtypes.add(_dtype(frame))
    if len(shapes) != 1:
        raise VideoError("the frames have different sizes: resize them to one size.")
    for dtype in dtypes:
        _check_dtype(dtype)
    return (len(video), *shapes.pop()), dtypes.pop()


def _dtype(array: torch.Tensor | np.ndarray) -> str:
    return str(array.dtype).removeprefix("torch.")


def _check_dtype(dtype: str) -> None:
    if dtype != "uint8" and "float" not in dtype:
        raise VideoError(f"frames have dtype {dtype}: give uint8, or floats in [0, 1].")


def _as_array(frame: Any) -> np.ndarray:
    """One frame as an array, its values unchanged."""
    if isinstance(frame, torch.Tensor):
        frame = frame.detach().cpu()
        return (frame.float() if frame.is_floating_point() else frame).numpy()
    try:
        return np.asarray(frame.convert("RGB") if isinstance(frame, Image.Image) else frame)
    except (TypeError, ValueError, OSError, SyntaxError) as error:  # PIL's for a broken PNG is a SyntaxError
        raise VideoError(f"a frame cannot be read as an image ({error}): give PIL images or uint8 arrays.") from None
