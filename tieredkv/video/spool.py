"""Frames that can be read only once, kept in a temporary file: those of an iterator."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np

from tieredkv.errors import VideoError
from tieredkv.video.frame import SIZES_DIFFER, as_array, channels_first, check_dtype, dtype_name, to_picture
from tieredkv.video.sampling import Sampling

LEAST_FREE = 2**30
"""Bytes of the disk that stay free."""
_CHECKED = 2**28
"""Bytes written between two looks at the free space."""


class Spool:
    """Those of an iterator's frames that are sampled, by their number among all, on any thread."""

    shape: tuple[int, ...]
    """`(T, H, W, 3)`, `T` being the number of frames read, kept or not."""
    sha256: str
    """Hash of all frames read, and their shape."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._file = tempfile.TemporaryFile(prefix="tieredkv-")  # noqa: SIM115  it lives as long as the spool
        self._written = self._looked = 0

    def keep(self, index: int, picture: np.ndarray) -> None:
        """Write a frame, unless it is there. Raises `VideoError` if the disk is full."""
        if index in self._places:
            return
        folder = tempfile.gettempdir()
        if self._written >= self._looked:
            self._looked = self._written + _CHECKED
            if shutil.disk_usage(folder).free < LEAST_FREE + _CHECKED:
                raise VideoError(_no_room(index, folder))
        try:
            self._file.write(picture.data)
        except OSError:
            raise VideoError(_no_room(index, folder)) from None
        self._places[index] = self._written
        self._written += picture.nbytes

    def complete(self, frames: int, height: int, width: int, sha256: str) -> None:
        """No more are kept."""
        self._file.flush()
        self.shape, self.sha256 = (frames, height, width, 3), sha256

    def __getitem__(self, index: int) -> np.ndarray:
        _, height, width, _ = self.shape
        stored = os.pread(self._file.fileno(), height * width * 3, self._places[index])
        return np.frombuffer(stored, np.uint8).reshape(height, width, 3)


def spool(frames: Iterator[Any], sampling: Sampling, check: Callable[[], None] | None = None) -> Spool:
    """Read an iterator to its end, or to that of `sampling`, and keep the frames that `ArraySource` will take.

    With `max_frames` these are all, because how they are spread depends on their number. check: called for every frame;
    may raise to stop. Raises `VideoError`, and what the iterator raises.
    """
    assert sampling.fps is not None
    rate = sampling.fps if sampling.source_fps is None else sampling.source_fps
    wanted = (int(sampling.start * rate + n * rate / sampling.fps + 1e-6) for n in count())
    due = next(wanted)
    spooled, digest, first, picture, index = Spool(), hashlib.sha256(), False, None, -1
    while sampling.end is None or (index + 1) / rate < sampling.end:
        if check is not None:
            check()
        frame = next(frames, None)
        if frame is None:
            break
        index += 1
        if picture is None:
            array = as_array(frame)
            check_dtype(dtype_name(array))
            first = channels_first((1, *array.shape))
        before, picture = picture, to_picture(frame, first)
        if before is not None and picture.shape != before.shape:
            raise VideoError(SIZES_DIFFER)
        digest.update(picture.data)
        if index >= due:
            spooled.keep(index, picture)
            while due <= index:
                due = index + 1 if sampling.max_frames is not None else next(wanted)
    if picture is None:
        raise VideoError("the video has no frames: give at least one.")
    spooled.keep(index, picture)  # shown up to the end
    height, width, _ = picture.shape
    digest.update(repr((index + 1, height, width, 3)).encode())
    spooled.complete(index + 1, height, width, digest.hexdigest())
    return spooled


def _no_room(index: int, folder: str) -> str:
    return (
        f"the disk of {folder} has no room for more than the first {index:,} frames: lower fps, set end, leave out "
        "max_frames, or set TMPDIR to a folder on another disk."
    )
