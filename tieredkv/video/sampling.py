"""Which frames of a video to take, and those of a file, decoded when they are requested."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from tieredkv.errors import VideoError, check_value, check_whole, is_number
from tieredkv.video import pyav as av
from tieredkv.video.container import cut_short, opened, reason
from tieredkv.video.film import Film, probe
from tieredkv.video.length import SAME_TIME
from tieredkv.video.picture import Painter
from tieredkv.video.playback import IndexFailed, Playback, Shot
from tieredkv.video.subtitles import AUTO, Cue
from tieredkv.video.timecodes import shown

Tick = Callable[[float], None]
"""Called for every decoded frame with the seconds of video decoded since the first sampling time; may raise to stop."""

BLOCK = 2**20
"""Bytes read at a time to hash a file."""


RATES = (1e-6, 1000.0)
"""Lowest and highest frames per second allowed: one in eleven days, and more than any camera records."""
LEAST_PIXELS = 256
"""Lowest `max_pixels` allowed, 16 x 16; a model's visual token needs more, which its family checks."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which frames of a video to take. Raises `VideoError` on construction for values that no video allows."""

    fps: float | None = None
    """Frames per second; None: as many as the model's processor takes, known once that is loaded."""
    source_fps: float | None = None
    """Rate of frames given as arrays; None: `fps`, so that none is dropped. Files state their own."""
    max_frames: int | None = None
    """Most frames; if there would be more, this many are spread evenly over the span."""
    start: float = 0.0
    """Seconds into the video of the first frame."""
    end: float | None = None
    """Seconds into the video at which to stop; None: at its end."""
    max_pixels: int | None = None
    """Most pixels of a frame as the vision tower sees it, in place of the limits of the model's processor; None: its
    own limits."""
    skip_damaged: bool = False
    """Go over what is damaged or missing in a file: the last whole picture is shown meanwhile, so that times stay true.
    Otherwise damage is refused."""
    subtitles: str | None = None
    """Words to write between the frames, by time: a subtitle file, or "auto", the video's own text track."""
    fit: bool = False
    """Choose `fps` and `max_pixels`, where they are None, so that the video fits the budgets (`planning.fitting`)."""

    def __post_init__(self) -> None:
        for name in ("fps", "source_fps"):
            if (value := getattr(self, name)) is not None:
                _check_rate(name, value)
        count, start, end = self.max_frames, self.start, self.end
        if count is not None:
            check_whole("max_frames", count, error=VideoError)
        if self.max_pixels is not None:
            check_whole("max_pixels", self.max_pixels, LEAST_PIXELS, error=VideoError)
        check_value(isinstance(self.skip_damaged, bool), "skip_damaged", self.skip_damaged, "True or False", VideoError)
        if self.subtitles is not None:
            if not isinstance(self.subtitles, str | os.PathLike) or not os.fspath(self.subtitles):
                raise VideoError(f"subtitles={self.subtitles!r} is not valid: give a subtitle file, or {AUTO!r}.")
            object.__setattr__(self, "subtitles", os.fspath(self.subtitles))
        check_value(isinstance(self.fit, bool), "fit", self.fit, "True or False", VideoError)
        if not is_number(start) or start < 0:
            raise VideoError(f"start={start!r} is not valid: give seconds from the video's beginning, 0 or more.")
        if end is not None and (not is_number(end) or end <= start + SAME_TIME):
            raise VideoError(
                f"end={end!r} is not valid: give seconds after start={shown(start)}, or None for the video's end."
            )

    def given(self) -> list[str]:
        """Names of the values that are not the defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]

    def spread(self, count: int, seconds: float) -> tuple[float, int]:
        """Frames per second, and how many, where `fps` would give `count` frames of `seconds`."""
        assert self.fps is not None
        most = self.max_frames
        return (self.fps, count) if most is None or count <= most else (most / seconds, most)


def _check_rate(name: str, value: Any) -> None:
    if not is_number(value) or not RATES[0] <= value <= RATES[1]:
        raise VideoError(f"{name}={value!r} is not valid: give frames per second, {RATES[0]:g} to {RATES[1]:g}.")


class FileSource:
    """Samples a video file: frame i is what is shown at `start + i / fps` seconds of the file.

    `start` is at least the time of the file's first frame. Each call of `frames` opens the file anew, so that several
    may run at once, on any threads.
    """

    def __init__(
        self,
        video: str | os.PathLike[str],
        sampling: Sampling,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Decodes the first frames of the file. Raises `VideoError` if there are none, or `start` is past the end.

        video: messages name it as `str` gives it. sampling: with `fps`. check: called for every packet if all must be
        read to find the length; may raise to stop.
        """
        video = Path(video) if isinstance(video, str) else video
        self._video = video  # a temporary file lives as long as this
        self.name = str(video)
        with self._named():
            self._film = probe(Path(video), sampling.end, check, sampling.skip_damaged)
        self.height, self.width = self._film.height, self._film.width
        assert sampling.fps is not None
        self.fps, self._limit = sampling.fps, sampling.max_frames
        self.seconds: float | None = None
        self._asked = sampling.start
        self.start = max(sampling.start, self._film.times.begin)
        self._until = math.inf if sampling.end is None else sampling.end
        self._seek = self._film.indexed and not sampling.skip_damaged
        self.cues: tuple[Cue, ...] = ()
        self.damaged: tuple[tuple[float, float], ...] = ()
        if self._until <= self.start + SAME_TIME:
            raise VideoError(
                f"{self.name}: end={shown(self._until)} is before the first picture, which comes at {self.start:.2f} s "
                "of the file: give a later end."
            )
        if self._film.end is None:
            self.expected = sampling.max_frames or 1
            return
        if self.start >= self._film.end:
            raise self._past_the_end(self._film.end)
        self.seconds = min(self._until, self._film.end) - self.start
        self.fps, self.expected = sampling.spread(_count(self.seconds, self.fps), self.seconds)

    def frames(self, tick: Tick | None = None, first: int = 0) -> Iterator[np.ndarray]:
        """The frames from number `first` on, uint8 `(H, W, 3)`. Samples of one picture share an array: do not write to
        it.

        Raises `VideoError` if decoding stops before the end, or the file has changed since it was opened.
        """
        furthest = 0.0

        def report(time: float) -> None:
            nonlocal furthest
            furthest = max(furthest, time - self.start)
            if tick is not None:
                tick(furthest)

        with self._named():
            yield from self._frames(first, report)

    def _frames(self, sampled: int, report: Tick) -> Iterator[np.ndarray]:
        for seek in (self._seek, False):
            try:
                with closing(self._pictures(sampled, seek, report)) as pictures:
                    for picture in pictures:
                        sampled += 1
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
        """Frames from the n-th on. Raises `IndexFailed` if the file must be decoded from its beginning."""
        self._check_size(0.0)
        film, screen = self._film, _Screen(self._film)
        with opened(film.path, film.stream) as (container, stream):
            playback = Playback(film, container, stream, seek, report)
            shot = playback.read(self._time(n))
            while shot is not None and self._includes(n):
                following = playback.read(self._time(n))
                end = playback.end_of(shot) if following is None else following.time
                while self._includes(n) and self._time(n) < end - SAME_TIME:
                    yield screen.paint(shot)
                    n += 1
                shot = following
            if film.skip_damaged:
                self.damaged = self._clipped(playback.damaged, n)
                return
            if film.cut is not None and film.end is not None and self._until > film.end:
                raise cut_short(film.path, film.end, film.cut)
            if self._includes(n):
                self._check_size(playback.clock.now)
                playback.check_end(self._until)
                if n == 0:
                    raise self._past_the_end(playback.clock.shown_until)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors call the video by its name, not by the path of a temporary file."""
        path = os.fspath(self._video)
        try:
            yield
        except VideoError as error:
            if path == self.name:
                raise
            raise VideoError(str(error).replace(path, self.name)) from None

    def _clipped(self, damaged: list[tuple[float, float]], frames: int) -> tuple[tuple[float, float], ...]:
        """Damaged spans as far as they are within what was sampled, those that touch joined."""
        stated = self._film.missing
        until = min(self._until, math.inf if self._limit is None or frames < self._limit else self._time(frames))
        spans: list[tuple[float, float]] = []
        for begin, end in sorted([*damaged, *([] if stated is None else [stated])]):
            begin, end = max(begin, self._asked), min(end, until)
            if spans and begin <= spans[-1][1] + SAME_TIME:
                spans[-1] = spans[-1][0], max(spans[-1][1], end)
            elif end > begin + SAME_TIME:
                spans.append((begin, end))
        return tuple(spans)

    def _time(self, n: int) -> float:
        return self.start + n / self.fps

    def _includes(self, n: int) -> bool:
        return (self._limit is None or n < self._limit) and self._time(n) < self._until - SAME_TIME

    def _check_size(self, time: float) -> None:
        try:
            size = os.path.getsize(self._film.path)
        except OSError as error:
            raise VideoError(f"{self.name}: the file was removed after it was opened ({reason(error)}).") from None
        if size < self._film.file_bytes:
            raise cut_short(self._film.path, time, f"it shrank from {self._film.file_bytes:,} to {size:,} bytes")

    def _past_the_end(self, seconds: float) -> VideoError:
        return VideoError(
            f"{self.name}: start={shown(self.start)} is past the end of the video, which ends at {seconds:.2f} s: "
            "give an earlier start."
        )


def _count(seconds: float, fps: float) -> int:
    """How many of 0, 1/fps, 2/fps ... are below `seconds`, at least one."""
    return max(1, math.ceil((seconds - SAME_TIME) * fps))


class _Screen:
    """Converts each shown frame to an array once."""

    def __init__(self, film: Film) -> None:
        self._film = film
        self._painter = Painter(film.path, film.geometry)
        self._shot: Shot | None = None
        self._picture: np.ndarray | None = None

    def paint(self, shot: Shot) -> np.ndarray:
        if self._picture is None or shot is not self._shot:
            self._shot, self._picture = shot, self._array(shot)
        return self._picture

    def _array(self, shot: Shot) -> np.ndarray:
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
