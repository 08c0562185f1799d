"""Frames of a video file at an even rate, decoded as they are asked for."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from tieredkv.errors import VideoError
from tieredkv.video.container import cut_short, decoded, opened, reason
from tieredkv.video.length import SAME_TIME
from tieredkv.video.picture import Painter
from tieredkv.video.timeline import Clock, Film, probe

Tick = Callable[[float], None]
"""Called for every decoded frame with the seconds of video decoded so far, counted from the first sampling time. May
raise to stop."""

BLOCK = 2**20
"""Bytes read at a time to hash a file."""


class FileSource:
    """Samples a video file: frame i is what is on screen at `start + i / fps` seconds of the file.

    `start` is that of the first frame, if an earlier one was asked for.
    Holds no open file: each call of `frames` opens its own, so that several may run, on any thread.
    """

    def __init__(
        self,
        path: Path,
        fps: float,
        max_frames: int | None,
        start: float,
        end: float | None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Opens the file and decodes its first frames. Raises `VideoError` if none comes, or `start` is past the end.

        check: called for every packet if all must be read to find the length; may raise to stop.
        """
        self._film = probe(path, end, check)
        self.name = str(path)
        self.height, self.width = self._film.height, self._film.width
        self.fps = fps
        self.seconds: float | None = None
        self.start, self._limit = max(start, self._film.times.begin), max_frames
        self._until = math.inf if end is None else end
        self._seek = self._film.indexed
        if self._until <= self.start + SAME_TIME:
            raise VideoError(
                f"{self.name}: end={self._until:g} is before the first picture, which comes at {self.start:.2f} s "
                "of the file: give a later end."
            )
        if self._film.end is None:
            self.expected = max_frames or 1
            return
        if self.start >= self._film.end:
            raise self._past_the_end(self._film.end)
        self.seconds = min(self._until, self._film.end) - self.start
        self.expected = _count(self.seconds, fps)
        if max_frames is not None and self.expected > max_frames:
            self.fps, self.expected = max_frames / self.seconds, max_frames

    def frames(self, tick: Tick | None = None) -> Iterator[np.ndarray]:
        """The frames, uint8 `(H, W, 3)`; one that is on screen for several is the same array: do not write to it.

        Raises `VideoError` where decoding stops before the end, or the file is not the one that was opened.
        """
        furthest = 0.0

        def report(time: float) -> None:
            nonlocal furthest
            furthest = max(furthest, time - self.start)
            if tick is not None:
                tick(furthest)

        given = 0
        for seek in (self._seek, False):
            try:
                with closing(self._pictures(given, seek, report)) as pictures:
                    for picture in pictures:
                        given += 1
                        yield picture
                break
            except IndexFailed:
                continue

    def sha256(self, check: Callable[[], None] | None = None) -> str:
        """Hash of the file's bytes, in hexadecimal. Raises `VideoError` if they cannot be read."""
        digest = hashlib.sha256()
        try:
            with self._film.path.open("rb") as file:
                while block := file.read(BLOCK):
                    if check is not None:
                        check()
                    digest.update(block)
        except OSError as error:
            raise VideoError(f"{self.name}: cannot be read ({reason(error)}).") from None
        return digest.hexdigest()

    def _pictures(self, n: int, seek: bool, report: Tick) -> Generator[np.ndarray]:
        """Frames from the n-th on. Raises `IndexFailed` where only decoding all of the file will do."""
        self._check_size(0.0)
        film, screen = self._film, _Screen(self._film)
        with opened(film.path, film.stream) as (container, stream):
            playback = _Playback(film, container, stream, seek, report)
            shot = playback.read(self._time(n))
            while shot is not None and self._wants(n):
                following = playback.read(self._time(n))
                leaves = _last_moment(shot) if following is None else following.time
                while self._wants(n) and self._time(n) < leaves - SAME_TIME:
                    yield screen.paint(shot)
                    n += 1
                shot = following
            if film.cut is not None and film.end is not None and self._until > film.end:
                raise cut_short(film.path, film.end, film.cut)
            if self._wants(n):
                self._check_size(playback.clock.now)
                playback.check_the_end(self._until)
                if n == 0:
                    raise self._past_the_end(playback.clock.shown_until)

    def _time(self, n: int) -> float:
        return self.start + n / self.fps

    def _wants(self, n: int) -> bool:
        return (self._limit is None or n < self._limit) and self._time(n) < self._until - SAME_TIME

    def _check_size(self, time: float) -> None:
        try:
            size = os.path.getsize(self._film.path)
        except OSError as error:
            raise VideoError(f"{self.name}: was there when it was opened, and is gone ({reason(error)}).") from None
        if size < self._film.bytes:
            raise cut_short(self._film.path, time, f"it shrank from {self._film.bytes:,} to {size:,} bytes")

    def _past_the_end(self, seconds: float) -> VideoError:
        return VideoError(
            f"{self.name}: start={self.start:g} is past the end of the video, which ends at {seconds:.2f} s: "
            "give an earlier start."
        )


class IndexFailed(Exception):
    """Seeking led nowhere, or to frames that may not be those that decoding from the beginning gives."""


class _Shot(NamedTuple):
    time: float
    frame: Any


def _count(seconds: float, fps: float) -> int:
    """How many of 0, 1/fps, 2/fps ... lie before `seconds`."""
    return max(1, math.ceil((seconds - SAME_TIME) * fps))


def _last_moment(shot: _Shot) -> float:
    """The last frame stays for its own duration, and for one sampling time at least."""
    frame = shot.frame
    duration = float((frame.duration or 0) * frame.time_base) if frame.time_base else 0.0
    return shot.time + max(duration, 2 * SAME_TIME)


class _Playback:
    """Frames of an open file in the order they are shown, leaving out stretches that nobody looks at."""

    def __init__(self, film: Film, container: Any, stream: Any, seek: bool, report: Tick) -> None:
        self.clock = Clock(film)
        self._film, self._container, self._stream = film, container, stream
        self._seek, self._report = seek, report
        self._decoded = decoded(container, stream)
        self._key_time: float | None = None
        self._spacing: float | None = None
        """The longest stretch between key frames seen so far, in seconds; None: fewer than two were seen."""
        self._sought = False

    def read(self, wanted: float) -> _Shot | None:
        """The next frame that is shown; None at the end. What has left the screen by `wanted` may be skipped.

        Raises `VideoError` where decoding fails, `IndexFailed` where it does so after a seek.
        """
        if self._seek and self._spacing is not None and wanted - self.clock.now > self._spacing:
            return self._enter(wanted)
        while (frame := self._decode()) is not None:
            time = self.clock.place(frame)
            self._report(self.clock.now)
            if self.clock.restarted:
                self._stop_seeking()
            if time is None:
                continue
            if frame.key_frame:
                if self._key_time is not None:
                    self._spacing = max(self._spacing or 0.0, time - self._key_time)
                self._key_time = time
            return _Shot(time, frame)
        return None

    def check_the_end(self, until: float) -> None:
        """Raise `VideoError` if the file ends before the length it states, or before `until`.

        `IndexFailed` if it may not have without seeking: how long the frame before the last stayed is unknown then.
        """
        film = self._film
        if film.end is None or film.tolerance is None or self.clock.restarted:
            return
        if self.clock.shown_until >= min(film.end, until) - film.tolerance:
            return
        if self._sought:
            raise IndexFailed
        raise cut_short(film.path, self.clock.shown_until, f"the file says it lasts {film.end:.2f} s")

    def _enter(self, wanted: float) -> _Shot:
        """Go to the last key frame shown at or before `wanted`, which may lie before the frame read last."""
        assert self._spacing is not None
        self._sought = True
        for before in (0.0, self._spacing, 4 * self._spacing):
            # An index may go by decoding times, which come before those of showing: step back if it is overshot.
            shot = self._enter_at(max(0.0, wanted - before))
            if shot is not None and shot.time <= wanted + SAME_TIME:
                # No key frame lies between: without this a long stretch would be entered again and again.
                self._spacing = max(self._spacing, wanted - shot.time)
                self._key_time = shot.time
                return shot
        raise IndexFailed

    def _enter_at(self, time: float) -> _Shot | None:
        try:
            offset = math.floor(self.clock.written(time) / self._stream.time_base)
            self._container.seek(offset, stream=self._stream, backward=True)
        except (av.FFmpegError, OSError):
            raise IndexFailed from None
        self._decoded = decoded(self._container, self._stream)
        while (frame := self._decode()) is not None:
            # Frames shown before the key frame may refer to others before it, which were not decoded.
            entered = self.clock.enter(frame) if frame.key_frame else None
            self._report(self.clock.now)
            if entered is not None:
                return _Shot(entered, frame)
        return None

    def _stop_seeking(self) -> None:
        """The file's times no longer say where a frame is; if some were sought by, begin again."""
        if self._sought:
            raise IndexFailed
        self._seek = False

    def _decode(self) -> Any:
        try:
            return next(self._decoded, None)
        except (av.FFmpegError, OSError) as error:
            if self._sought:
                raise IndexFailed from None
            raise cut_short(self._film.path, self.clock.now, reason(error)) from None


class _Screen:
    """What is shown, as arrays, each made once."""

    def __init__(self, film: Film) -> None:
        self._film = film
        self._painter = Painter(film.path, film.geometry)
        self._shot: _Shot | None = None
        self._picture: np.ndarray | None = None

    def paint(self, shot: _Shot) -> np.ndarray:
        if self._picture is None or shot is not self._shot:
            self._shot, self._picture = shot, self._array(shot)
        return self._picture

    def _array(self, shot: _Shot) -> np.ndarray:
        try:
            picture = self._painter.paint(shot.frame)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise cut_short(self._film.path, shot.time, reason(error)) from None
        height, width, _ = picture.shape
        if (height, width) != (self._film.height, self._film.width):
            raise VideoError(
                f"{self._film.path}: the picture changes from {self._film.width}x{self._film.height} to "
                f"{width}x{height} at {shot.time:.2f} s: re-encode the file at one size."
            )
        return picture
