"""Converts the timestamps of a video file to seconds that only increase, as its frames are decoded."""

from __future__ import annotations

from typing import Any

from tieredkv.video.container import cut_short
from tieredkv.video.film import Film
from tieredkv.video.length import JITTER, JUMP


class Clock:
    """Converts timestamps to seconds on the file's clock.

    A frame up to `JITTER` earlier than the one before is left out. A frame even earlier begins a part with a restarted
    clock (joined recordings), which continues where the previous part ends. But if the frame is also that much earlier
    than its own decoding time, its time is wrong and it is left out.
    """

    def __init__(self, film: Film) -> None:
        self._film = film
        self.now = film.times.begin
        """When the last frame is shown."""
        self.stay = 0.0
        """How long the frame before it was shown."""
        self.restarted = False
        self._zero: float | None = None
        """The timestamp, in seconds, of time 0."""
        self._former: tuple[float, float] | None = None
        """Before the last restart: the zero, and when the last frame was shown."""
        self._duration = 0.0
        self._count = 0
        self._decoding = 0.0
        """Decoding time of the last frame."""

    def place(self, frame: Any) -> float | None:
        """When `frame`, decoded next, is shown; None: it is left out. Raises `VideoError` for a jump."""
        timestamp = self._timestamp(frame)
        if timestamp is None:
            return None
        if self._zero is None:
            # With decoding times, the packet that yields the first frame may come later than the delay suggests.
            self._zero = timestamp - self.now if self._film.times.delay is None else self._film.times.zero
            self._duration = duration(frame)
            return self.now
        time = timestamp - self._zero
        if self._former is not None and time > self.now + JITTER and 0 <= timestamp - sum(self._former) <= JITTER:
            # Not a restart: a decoder confused by damage returned frames late.
            self._zero, self._former = self._former[0], None
            time = timestamp - self._zero
        if time < self.now - JITTER:
            if frame.dts is not None and timestamp < float(frame.dts * frame.time_base) - JITTER:
                return None
            self._former = (self._zero, self.now)
            time = self.now + (self._duration or self.stay)
            self._zero = timestamp - time
            self.restarted = True
        elif time < self.now:
            return None
        self._check_jump(time)
        self.stay = time - self.now
        self.now = time
        self._duration = duration(frame)
        return time

    def skip(self, frames: int) -> None:
        """Count frames that were lost, in a file whose frames have no times."""
        self._count += frames

    def enter(self, frame: Any) -> float | None:
        """As `place`, for the first frame after a seek."""
        timestamp = self._timestamp(frame)
        if timestamp is None or self._zero is None:
            return None
        self.now, self.stay, self._duration = timestamp - self._zero, 0.0, duration(frame)
        return self.now

    def timestamp(self, time: float) -> float:
        """The timestamp, in seconds, of `time`."""
        return (self._zero or 0.0) + time

    @property
    def shown_until(self) -> float:
        """When the last frame ends: after its own duration or, if longer, that of the frame before."""
        return self.now + max(self._duration, self.stay)

    def _timestamp(self, frame: Any) -> float | None:
        times = self._film.times
        if times.rate is not None:
            self._count += 1
            return float((self._count - 1) / times.rate)
        if times.delay is None:
            return frame.time
        if frame.dts is None:  # one of the last frames, which the decoder returns without a packet
            self._decoding += self._duration or self.stay
        else:
            self._decoding = float(frame.dts * frame.time_base)
        return self._decoding - times.delay

    def _check_jump(self, time: float) -> None:
        """Raise `VideoError` rather than let a damaged timestamp fill the video with one picture."""
        film = self._film
        if film.tolerance is None or film.end is None or self.restarted:
            latest, allowed, states = 0.0, JUMP, "and the file states no length"
        else:
            # The stated end may count from timestamp 0 instead of from the clock's zero.
            latest = film.end + film.tolerance + max(0.0, film.times.zero)
            allowed, states = film.tolerance, f"past the {film.end:.2f} s that the file states"
        if time > latest and time - self.now > allowed:
            raise cut_short(
                film.path, self.now, f"the next frame has a timestamp {time - self.now:.2f} s later, {states}"
            )


def duration(frame: Any) -> float:
    """Seconds that a frame is to stay on screen, as it states; 0 if it states none."""
    return float((frame.duration or 0) * frame.time_base) if frame.time_base else 0.0
