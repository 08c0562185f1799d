"""Frames of an open video file in the order in which they are shown, skipping stretches that are not sampled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from tieredkv.errors import VideoError
from tieredkv.video import pyav as av
from tieredkv.video.clock import Clock, duration
from tieredkv.video.container import cut_short, decoded, reason
from tieredkv.video.film import Film
from tieredkv.video.length import SAME_TIME
from tieredkv.video.salvage import Salvage


class IndexFailed(Exception):
    """A seek failed, or may have led to other frames than decoding from the beginning does."""


class Shot(NamedTuple):
    """A frame and when it is shown, in seconds."""

    time: float
    frame: Any

    @property
    def end(self) -> float:
        """When it ends if no frame follows: the last frame is shown at one sampling time at least."""
        return self.time + max(duration(self.frame), 2 * SAME_TIME)


class Playback:
    """Reads the frames of an open file."""

    def __init__(self, film: Film, container: Any, stream: Any, seek: bool, report: Callable[[float], None]) -> None:
        """seek: skip stretches by seeking. report: called for every decoded frame with its time; may raise to stop."""
        self.clock = Clock(film)
        self._film, self._container, self._stream = film, container, stream
        self._seek, self._report = seek, report
        self._salvage = Salvage(container, stream) if film.skip_damaged else None
        self._decoded = self._salvage or decoded(container, stream)
        self.damaged: list[tuple[float, float]] = []
        """With `skip_damaged`, from when to when pictures are missing, as far as read."""
        self._last: Shot | None = None
        self._lost = False
        """Whether a picture after the last was lost."""
        self._key_time: float | None = None
        self._spacing: float | None = None
        """The longest time between key frames so far, in seconds; None: fewer than two were read."""
        self._sought = False

    def read(self, target: float) -> Shot | None:
        """The next frame that is shown, None at the end; frames that end before `target` may be skipped.

        Raises `VideoError` if decoding fails, `IndexFailed` if it fails after a seek.
        """
        if self._seek and self._spacing is not None and target - self.clock.now > self._spacing:
            return self._enter(target)
        while (frame := self._decode()) is not None:
            time = self._place(frame)
            self._report(self.clock.now)
            if self.clock.restarted:
                self._stop_seeking()
            if time is None:
                continue
            if frame.key_frame:
                if self._key_time is not None:
                    self._spacing = max(self._spacing or 0.0, time - self._key_time)
                self._key_time = time
            return self._shown(Shot(time, frame))
        return None

    def end_of(self, last: Shot) -> float:
        """When the last frame ends; with `skip_damaged`, those missing after it are replaced by it."""
        film, clock = self._film, self.clock
        if self._salvage is None or film.end is None:
            return last.end
        slack = film.tolerance or 2 * SAME_TIME
        if self._lost or self._salvage.lost_before(None) or clock.shown_until < film.end - slack:
            self.damaged.append((min(clock.shown_until, film.end), film.end))
            return max(film.end, last.end)
        return last.end

    def _shown(self, shot: Shot) -> Shot:
        """Note what is missing between the frame before and `shot`."""
        if self._lost:
            self.damaged.append((0.0 if self._last is None else min(self._last.end, shot.time), shot.time))
        self._last, self._lost = shot, False
        return shot

    def _place(self, frame: Any) -> float | None:
        if self._salvage is None:
            return self.clock.place(frame)
        lost = self._salvage.lost_before(frame)
        self.clock.skip(lost)
        self._lost |= lost > 0
        try:
            return self.clock.place(frame)
        except VideoError:  # a damaged timestamp
            self._lost = True
            return None

    def check_end(self, until: float) -> None:
        """Raise `VideoError` if the frames end before the length that the file states and before `until`.

        `IndexFailed` if there was a seek: how long the frame before the last was shown is then unknown.
        """
        film = self._film
        if film.end is None or film.tolerance is None or self.clock.restarted:
            return
        if self.clock.shown_until >= min(film.end, until) - film.tolerance:
            return
        if self._sought:
            raise IndexFailed
        raise cut_short(film.path, self.clock.shown_until, f"the file says it lasts {film.end:.2f} s")

    def _enter(self, target: float) -> Shot:
        """Seek to the last key frame shown at or before `target`, which may lie before the last frame read."""
        assert self._spacing is not None
        self._sought = True
        for before in (0.0, self._spacing, 4 * self._spacing):
            # An index may hold decoding times, which are earlier than presentation times: step back if it overshoots.
            shot = self._enter_at(max(0.0, target - before))
            if shot is not None and shot.time <= target + SAME_TIME:
                # No key frame comes between: without this, each read would seek to the same key frame again.
                self._spacing = max(self._spacing, target - shot.time)
                self._key_time = shot.time
                return shot
        raise IndexFailed

    def _enter_at(self, time: float) -> Shot | None:
        try:
            offset = math.floor(self.clock.timestamp(time) / self._stream.time_base)
            self._container.seek(offset, stream=self._stream, backward=True)
        except (av.FFmpegError, OSError):
            raise IndexFailed from None
        self._decoded = decoded(self._container, self._stream)
        while (frame := self._decode()) is not None:
            # Frames shown before the key frame may depend on earlier ones, which were not decoded.
            entered = self.clock.enter(frame) if frame.key_frame else None
            self._report(self.clock.now)
            if entered is not None:
                return Shot(entered, frame)
        return None

    def _stop_seeking(self) -> None:
        """Timestamps no longer locate frames. Raises `IndexFailed` if a seek has relied on them."""
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
