"""Frames given as arrays, tensors or images, sampled by their rate."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from tieredkv.errors import VideoError
from tieredkv.video.frame import SIZES_DIFFER, as_array, channels_first, check_dtype, dtype_name, to_picture
from tieredkv.video.sampling import Sampling, Tick
from tieredkv.video.spool import Spool
from tieredkv.video.subtitles import Cue


class ArraySource:
    """Samples frames of an array, a tensor or a list of images, and converts each when it is asked for."""

    name = "the frames given"
    cues: tuple[Cue, ...] = ()
    damaged: tuple[tuple[float, float], ...] = ()

    def __init__(self, video: Any, sampling: Sampling) -> None:
        """Keeps `video` without a copy. Raises `VideoError` if its type, shape or dtype is not that of a video.

        sampling: with `fps`.
        """
        self._video = video
        if isinstance(video, Spool):
            shape, dtype = video.shape, "uint8"
        elif isinstance(video, torch.Tensor | np.ndarray):
            shape, dtype = tuple(video.shape), dtype_name(video)
        else:
            shape, dtype = _form_of_list(video)
        self._lock = threading.Lock()  # an image or a lazy reader must not be read by two threads at once
        self._channels_first = channels_first(shape)
        if 0 in shape:
            raise VideoError(f"the video has no frames or empty ones: its shape is {shape}.")
        check_dtype(dtype)
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
        if isinstance(self._video, Spool):
            return self._video.sha256
        digest = hashlib.sha256(repr((self._count, self.height, self.width, 3)).encode())
        for index in range(self._count):
            if check is not None:
                check()
            digest.update(self._picture(index).data)
        return digest.hexdigest()

    def _picture(self, index: int) -> np.ndarray:
        with self._lock:
            picture = to_picture(self._video[index], self._channels_first)
        if picture.shape[:2] != (self.height, self.width):
            raise VideoError(SIZES_DIFFER)
        return picture


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
                frame = as_array(frame)
            shapes.add(tuple(frame.shape))
            dtypes.add(dtype_name(frame))
    if len(shapes) != 1:
        raise VideoError(SIZES_DIFFER)
    for dtype in dtypes:
        check_dtype(dtype)
    return (len(video), *shapes.pop()), dtypes.pop()
