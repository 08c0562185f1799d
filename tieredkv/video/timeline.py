"""When each frame of a video file is shown: how long the file is, and a clock over the times written in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from tieredkv.errors import VideoError

JITTER = 1.0
"""Seconds a frame's time may run backwards: it is left out. Further back, the file's clock has been restarted."""
JUMP = 600.0
"""Seconds a frame may be later than the one before it in a file that does not say how long it is."""
SAME_TIME = 1e-4
"""Seconds: a frame this little after a sampling time still counts as shown at it (container clocks round)."""

_GUESSED = {"mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc"}
"""Formats that state no length. FFmpeg guesses one from the last time written or the bit rate, which is wrong where
recordings were joined."""
_FROM_ZERO = {"matroska,webm", "flv"}
"""Formats whose stated length is the time the video ends, whenever it begins."""
_LONGEST = 30 * 86400
"""Seconds: a stated length above this is a damaged number."""
_INDEXED = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
"""Formats with an index of key frames that FFmpeg seeks by."""
_TIMELESS = 50
"""Frames without a time, from the first on, after which no other frame is expected to have one."""


@dataclass(frozen=True, slots=True)
class Film:
    """What there is to know of a video file before it is played."""

    path: Path
    width: int
    height: int
    """Of the first frame, turned upright."""
    seconds: float | None
    """From the first frame to the end of the last, as stated or, where it is not, as found in the packets."""
    tolerance: float | None
    """Seconds the video may end before or after what is stated; None: the file states no length."""
    rate: Fraction | None
    """Frames per second of a file whose frames have no times; None: they have."""
    indexed: bool
    """Whether the file can be entered at any key frame."""
    bytes: int


def probe(path: Path, end: float | None = None, check: Callable[[], None] | None = None) -> Film:
    """Decode the first frame of `path`, and find its length, reading no packet of the rest if it is stated.

    end: seconds since the first frame after which nothing is needed; a search for the length stops there, or
    where `check`, called for every packet, raises. Raises `VideoError` if there is no frame to be had.
    """
    try:
        size = os.path.getsize(path)
    except OSError as error:
        raise unreadable(path, error) from None
    first, timeless = None, 0
    with opened(path) as (container, stream):
        try:
            for frame in decoded(container, stream):
                first = frame if first is None or frame.time is not None else first
                timeless += frame.time is None
                if frame.time is not None or timeless == _TIMELESS:
                    break
        except (av.FFmpegError, OSError) as error:
            if first is None:
                raise unreadable(path, error) from None
        if first is None:
            raise VideoError(f"{path}: there is a video stream but not one frame in it.")
        rate = None
        if first.time is None:
            # The guess looks at the frames; the average of a raw stream is FFmpeg's default of 25.
            rate = Fraction(stream.guessed_rate or stream.average_rate or 25)
        kind = container.format.name
        seconds, tolerance = (None, 0.0) if kind in _GUESSED or rate is not None else _stated(container, stream)
    if seconds is not None and kind in _FROM_ZERO and 0 < first.time < seconds:
        seconds -= first.time
    stated = seconds is not None
    if not stated:
        seconds = _scan(path, first.time, rate, end, check)
    width, height = first.width, first.height
    if quarter_turns(first) % 2:
        width, height = height, width
    indexed = kind in _INDEXED and rate is None
    return Film(path, width, height, seconds, tolerance if stated else None, rate, indexed, size)


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The file's container and video stream, closed at the end of the block. Raises `VideoError`."""
    try:
        # Absolute: FFmpeg would take what stands before a colon in a bare name for a protocol.
        container = av.open(str(path.absolute()), metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        raise unreadable(path, error) from None
    with container:
        streams = (s for s in container.streams.video if Disposition.attached_pic not in s.disposition)
        stream = next(streams, None)
        if stream is None:
            raise VideoError(f"{path}: there is no video stream in this file.")
        if stream.codec_context is None:
            raise VideoError(
                f"{path}: FFmpeg has no decoder for this file's video: re-encode it, as H.264 for example."
            )
        stream.thread_type = "AUTO"
        yield container, stream


def decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Frames from where the container stands. Raises `av.FFmpegError` or `OSError` where decoding fails."""
    try:
        yield from container.decode(stream)
    except IndexError:
        # PyAV comes upon a stream that appeared in mid-file after the last packet, when it flushes the decoders.
        flush = av.Packet()
        flush.stream, flush.time_base = stream, stream.time_base
        yield from stream.decode(flush)


def quarter_turns(frame: Any) -> int:
    """Counterclockwise quarter turns after which `frame` stands upright, 0 to 3."""
    return round(frame.rotation / 90) % 4


def unreadable(path: Path, error: Exception) -> VideoError:
    return VideoError(f"{path}: not a readable video file ({reason(error)}).")


def cut_short(path: Path, time: float, why: str) -> VideoError:
    return VideoError(
        f"{path}: decoding stopped at {time:.2f} s ({why}): the file is damaged or cut short. "
        "Get it whole, or re-encode what there is."
    )


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


class Clock:
    """Turns the times written in a file into seconds since its first frame, which only go forward.

    A frame up to `JITTER` in the past is left out. A frame further back than that begins a part whose clock was
    restarted (recordings joined): it follows what was shown, and so does the rest.
    """

    def __init__(self, film: Film) -> None:
        self._film = film
        self.now = 0.0
        """When the frame placed last came on screen."""
        self.stay = 0.0
        """How long the one before it stayed."""
        self.restarted = False
        self._zero: float | None = None
        """Time written in the file that stands for 0."""
        self._former: tuple[float, float] | None = None
        """The zero before the clock restarted, and when the last frame by it came on screen."""
        self._duration = 0.0
        self._count = 0

    def place(self, frame: Any) -> float | None:
        """When `frame`, the next decoded, comes on screen; None: it is not shown. Raises `VideoError` for a jump."""
        written = self._written(frame)
        if written is None:
            return None
        if self._zero is None:
            self._zero = written
            self._duration = _duration(frame)
            return self.now
        time = written - self._zero
        if self._former is not None and time > self.now + JITTER and 0 <= written - sum(self._former) <= JITTER:
            # What looked like a restart were frames that a decoder, thrown off by damage, let go of late.
            self._zero, self._former = self._former[0], None
            time = written - self._zero
        if time < self.now - JITTER:
            self._former = (self._zero, self.now)
            time = self.now + (self._duration or self.stay)
            self._zero = written - time
            self.restarted = True
        elif time < self.now:
            return None
        self._check_jump(time)
        self.stay = time - self.now
        self.now = time
        self._duration = _duration(frame)
        return time

    def enter(self, frame: Any) -> float | None:
        """As `place`, for a frame that does not follow the one before: the file was entered at `frame`."""
        written = self._written(frame)
        if written is None or self._zero is None:
            return None
        self.now, self.stay, self._duration = written - self._zero, 0.0, _duration(frame)
        return self.now

    def written(self, time: float) -> float:
        """The time written in the file that stands for `time`."""
        return (self._zero or 0.0) + time

    @property
    def shown_until(self) -> float:
        """When the frame placed last leaves the screen: after its own duration, or as long as the one before stayed."""
        return self.now + max(self._duration, self.stay)

    def _written(self, frame: Any) -> float | None:
        if self._film.rate is None:
            return frame.time
        self._count += 1
        return float((self._count - 1) / self._film.rate)

    def _check_jump(self, time: float) -> None:
        """A damaged time must not fill the video with one picture; a picture shown long within its length may."""
        film = self._film
        if film.tolerance is None or film.seconds is None or self.restarted:
            latest, allowed, states = 0.0, JUMP, "and the file does not say how long it is"
        else:
            # What is stated may count from zero of the file's clock, and the first frame come later than that.
            latest = film.seconds + film.tolerance + max(0.0, self.written(0.0))
            allowed, states = film.tolerance, f"past the {film.seconds:.2f} s the file says it lasts"
        if time > latest and time - self.now > allowed:
            raise cut_short(
                film.path, self.now, f"the next frame is written as {time - self.now:.2f} s later, {states}"
            )


def _duration(frame: Any) -> float:
    return float((frame.duration or 0) * frame.time_base) if frame.time_base else 0.0


def _stated(container: Any, stream: Any) -> tuple[float | None, float]:
    """How long the file says its video is (None: it does not say), and by how much the last frame may fall short."""
    seconds = None
    if stream.duration is not None and stream.time_base is not None:
        seconds = float(stream.duration * stream.time_base)
    elif tag := stream.metadata.get("DURATION"):  # matroska's, "00:01:02.500000000"
        seconds = _clock_seconds(tag)
    if container.format.name == "avi" and stream.frames and stream.average_rate:
        # FFmpeg shortens the length of a file that was cut, but not the count.
        seconds = max(seconds or 0.0, float(stream.frames / stream.average_rate))
    if seconds is not None and 0 < seconds < _LONGEST:
        return seconds, 1.0
    # The length of the longest stream, which may be the sound.
    seconds = (container.duration or 0) / av.time_base
    if not 0 < seconds < _LONGEST:
        return None, 0.0
    return seconds, 1.0 if len(container.streams) == 1 else max(5.0, 0.1 * seconds)


def _clock_seconds(text: str) -> float | None:
    try:
        hours, minutes, seconds = text.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return None


def _scan(
    path: Path, first: float | None, rate: Fraction | None, end: float | None, check: Callable[[], None] | None
) -> float | None:
    """Length in seconds by the times of the packets, none of which is decoded; None: they have none.

    first: time written for the first frame. What `Clock` would make of the times is foreseen here, as far as packets,
    which come in the order of decoding, let it be: only at a key frame can the clock be seen to restart.
    """
    length, newest, zero, count = 0.0, None, first or 0.0, 0
    with opened(path) as (container, stream):
        try:
            for packet in container.demux(stream):
                if check is not None:
                    check()
                count += packet.size > 0
                if packet.pts is None:
                    continue
                time = float(packet.pts * packet.time_base) - zero
                if newest is not None and packet.is_keyframe and time < newest - JITTER:
                    zero += time - length
                    newest = time = length
                if newest is not None and time - newest > JUMP:
                    break
                newest = time if newest is None else max(newest, time)
                length = max(length, time + float((packet.duration or 0) * packet.time_base))
                if end is not None and length > end + JITTER:
                    break
        except (av.FFmpegError, OSError, IndexError):  # the last as in `decoded`
            pass  # decoding comes to the same place, and says which
    if rate is not None:
        return float(count / rate)
    return None if newest is None else max(length, SAME_TIME)
