"""Readers of other packages that decode a file by themselves: decord's `VideoReader`, torchcodec's `VideoDecoder`.

Known by their methods, so that neither package is imported. Times are the reader's own.
"""

from __future__ import annotations

import hashlib
import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tieredkv.errors import VideoError, first_line, is_number
from tieredkv.video.frame import SIZES_DIFFER, channels_first, check_dtype, dtype_name, to_picture
from tieredkv.video.length import SAME_TIME
from tieredkv.video.sampling import Sampling, Tick
from tieredkv.video.subtitles import Cue

_HASHED = 32
"""Frames, evenly spread, that identify a video: reading all of them beside those sampled would seek all the time."""


def is_reader(video: Any) -> bool:
    """Whether this reads frames by number and states its rate."""
    indexed = hasattr(type(video), "__len__") and hasattr(type(video), "__getitem__")
    return indexed and (
        callable(getattr(video, "get_avg_fps", None)) or hasattr(getattr(video, "metadata", None), "average_fps")
    )


class ReaderSource:
    """Samples a reader by time: frame i is what the reader has at `start + i / fps` seconds."""

    name = "the reader given"
    cues: tuple[Cue, ...] = ()
    damaged: tuple[tuple[float, float], ...] = ()

    def __init__(self, reader: Any, sampling: Sampling) -> None:
        """Decodes the first frame. Raises `VideoError`. sampling: with `fps`."""
        self._reader = reader
        self._lock = threading.Lock()  # readers seek in one file
        self._count = len(reader)
        if not self._count:
            raise VideoError("the reader given has no frames.")
        rate = _rate(reader)
        self._times, self._end = _times(reader, self._count, rate)
        with self._lock:
            frame = reader[0]
        frame = frame.asnumpy() if callable(getattr(frame, "asnumpy", None)) else frame
        check_dtype(dtype_name(frame))
        self._channels_first = channels_first((self._count, *frame.shape))
        self.height, self.width = to_picture(frame, self._channels_first).shape[:2]
        assert sampling.fps is not None
        self.start = max(sampling.start, self._times[0])
        until = self._end if sampling.end is None else min(self._end, sampling.end)
        if until <= self.start + SAME_TIME:
            raise VideoError(
                f"there is nothing between start={self.start:g} and {until:.2f} s of the reader given, which ends at "
                f"{self._end:.2f} s: give other times."
            )
        self.seconds: float | None = until - self.start
        self.fps, self.expected = sampling.spread(
            max(1, math.ceil((self.seconds - SAME_TIME) * sampling.fps)), self.seconds
        )

    def frames(self, tick: Tick | None = None, first: int = 0) -> Iterator[np.ndarray]:
        """The frames from number `first` on. Raises `VideoError` if the reader fails."""
        for n in range(first, self.expected):
            if tick is not None:
                tick(n / self.fps)
            yield self._shown(self.start + n / self.fps)

    def sha256(self, check: Callable[[], None] | None = None) -> str:
        """Hash of number, size and times of the frames, and of some of them."""
        digest = hashlib.sha256(repr((self._count, self.height, self.width, 3, self._times[-1])).encode())
        for index in np.unique(np.linspace(0, self._count - 1, _HASHED).astype(int)).tolist():
            if check is not None:
                check()
            digest.update(self._picture(index).data)
        return digest.hexdigest()

    def _shown(self, time: float) -> np.ndarray:
        at = min(time, self._end - 2 * SAME_TIME) + SAME_TIME
        if callable(getattr(self._reader, "get_frame_played_at", None)):  # torchcodec, which knows each frame's time
            return self._read(f"frame at {time:.2f} s", lambda: self._played(at))
        return self._picture(max(0, bisect_right(self._times, at) - 1))

    def _played(self, at: float) -> Any:
        frame = self._reader.get_frame_played_at(at)
        if frame.pts_seconds <= at:
            return frame.data
        # Past the end of a frame torchcodec has the next one; players show the former one on.
        place = bisect_right(range(self._count), at, key=lambda index: self._reader.get_frame_at(index).pts_seconds)
        return self._reader[max(0, place - 1)]

    def _picture(self, index: int) -> np.ndarray:
        return self._read(f"frame {index}", lambda: self._reader[index])

    def _read(self, what: str, read: Callable[[], Any]) -> np.ndarray:
        try:
            with self._lock:
                picture = to_picture(read(), self._channels_first)
        except (RuntimeError, IndexError, OSError) as error:
            raise VideoError(f"the reader given cannot read its {what} ({first_line(error)}).") from None
        if picture.shape[:2] != (self.height, self.width):
            raise VideoError(SIZES_DIFFER)
        return picture


def _rate(reader: Any) -> float:
    rate = reader.get_avg_fps() if hasattr(reader, "get_avg_fps") else reader.metadata.average_fps
    if not is_number(rate := float(rate) if rate is not None else None) or rate <= 0:
        raise VideoError(f"the reader given states {rate!r} frames per second: give the path of the file instead.")
    return rate


def _times(reader: Any, count: int, rate: float) -> tuple[list[float], float]:
    """When each frame is shown, in seconds, and when the last one ends; by the rate, where a reader does not say."""
    if callable(getattr(reader, "get_frame_timestamp", None)):  # decord
        spans = np.asarray(reader.get_frame_timestamp(list(range(count))), np.float64)
        if spans.shape == (count, 2) and (np.diff(spans[:, 0]) > 0).all():
            return spans[:, 0].tolist(), float(max(spans[-1, 1], spans[-1, 0] + 2 * SAME_TIME))
    metadata = getattr(reader, "metadata", None)
    begin, end = (getattr(metadata, f"{name}_stream_seconds", None) for name in ("begin", "end"))
    begin = begin if is_number(begin) else 0.0
    length = getattr(metadata, "duration_seconds", None)
    if not is_number(end):
        end = begin + length if is_number(length) else begin + count / rate
    return [begin + index / rate for index in range(count)], max(end, begin + 2 * SAME_TIME)
