"""When each frame of a video file is shown: what there is to know before it is played, and a clock over its times.

All times are seconds on the file's own clock, as players show it: it begins where the first of the file's streams does,
which may be the sound.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import av

from tieredkv.errors import VideoError
from tieredkv.video.container import cut_short, decoded, opened, unreadable, video_streams
from tieredkv.video.length import JITTER, JUMP, Times, find_length
from tieredkv.video.picture import Geometry, Painter
from tieredkv.video.structure import MATROSKA, MP4

_INDEXED = {MP4, MATROSKA}
"""Formats with an index of key frames that FFmpeg seeks by."""
_DECODING_TIMES = {"avi", "asf"}
"""Formats that store decoding times only. FFmpeg guesses the others, wrongly where it does not foresee the B-frames."""
_TIMELESS = 50
"""Frames without a time, from the first on, after which no other frame is expected to have one."""
_ORDERED = 8
"""Frames after the first by which it is seen whether the times of a file with B-frames are in order."""


@dataclass(frozen=True, slots=True)
class Film:
    """What there is to know of a video file before it is played."""

    path: Path
    stream: int
    """Index of the stream that is shown."""
    width: int
    height: int
    """Of the first frame as it is shown: with square pixels, turned upright."""
    geometry: Geometry
    times: Times
    end: float | None
    """When the last frame ends, as stated or, where it is not, as found in the packets."""
    tolerance: float | None
    """Seconds the video may end before or after what is stated; None: the file states no length."""
    cut: str | None
    """What shows that the end of the file is missing, where its stated length does not."""
    indexed: bool
    """Whether the file can be entered at any key frame."""
    bytes: int


def probe(path: Path, end: float | None = None, check: Callable[[], None] | None = None) -> Film:
    """Decode the first frame of `path`, and find its length, reading no packet of the rest if it is stated.

    end: time after which nothing is needed; a search for the length stops there, or where `check`, called for every
    packet, raises. Raises `VideoError` if there is no frame to be had.
    """
    try:
        size = os.path.getsize(path)
    except OSError as error:
        raise unreadable(path, error) from None
    for index in video_streams(path):
        with opened(path, index) as (container, stream):
            beginning = _beginning(path, container, stream)
            if beginning is None:
                if stream.frames:
                    break  # it has frames, but they are not in what is left of the file
                continue
            geometry = Geometry.of(path, container, stream)
            times = _times(path, container, stream, beginning)
            length = find_length(path, container, stream, times, end, check)
            try:
                height, width, _ = Painter(path, geometry).paint(beginning.first).shape
            except (av.FFmpegError, OSError, ValueError) as error:
                raise unreadable(path, error) from None
            indexed = container.format.name in _INDEXED and times.rate is None and times.delay is None
            return Film(path, index, width, height, geometry, times, *length, indexed, size)
    raise VideoError(f"{path}: there is a video stream but not one frame in it.")


class _Beginning(NamedTuple):
    first: Any
    """The first frame that has a time or, if none has, the first."""
    by_decoding: bool
    """Whether only decoding times tell the order of the frames."""


def _beginning(path: Path, container: Any, stream: Any) -> _Beginning | None:
    """The first frame, and which of the times that frames have to believe; None: no frame comes."""
    by_decoding = container.format.name in _DECODING_TIMES
    first, timeless, shown, decoding = None, 0, [], []
    try:
        for frame in decoded(container, stream):
            time = frame.dts if by_decoding else frame.pts
            if first is None or (time is not None and not shown):
                first = frame
            timeless += time is None
            if time is not None:
                shown.append(time)
                decoding.append(frame.dts)
            enough = 1 + (_ORDERED if stream.codec_context.has_b_frames and not by_decoding else 0)
            if len(shown) >= enough or (not shown and timeless == _TIMELESS):
                break
    except (av.FFmpegError, OSError) as error:
        if first is None:
            raise unreadable(path, error) from None
    if first is None:
        return None
    # A time in the past may be damage; two of eight are a file without times of showing.
    if not by_decoding and _back(shown) >= 2 and None not in decoding and not _back(decoding):
        by_decoding = True
    return _Beginning(first, by_decoding and bool(shown))


def _back(times: list[int]) -> int:
    return sum(after <= before for before, after in pairwise(times))


def _times(path: Path, container: Any, stream: Any, beginning: _Beginning) -> Times:
    first, delay = beginning.first, None
    if beginning.by_decoding:
        written, taken = _first_packets(path, stream, first)
        delay = max(0.0, float(first.dts * first.time_base) - written)
        if stream.average_rate:  # no longer than the packets last, if pictures are missing between them
            delay = min(delay, float(taken / stream.average_rate))
    elif first.time is None:
        # The guess looks at the frames; the average of a raw stream is FFmpeg's default of 25.
        return Times(0.0, 0.0, None, Fraction(stream.guessed_rate or stream.average_rate or 25))
    else:
        written = first.time
    zero = written if container.start_time is None else min(written, container.start_time / av.time_base)
    return Times(zero, written - zero, delay, None)


def _first_packets(path: Path, stream: Any, first: Any) -> tuple[float, int]:
    """Decoding time in seconds of the stream's first packet, and how many came before the one that brought `first`."""
    with opened(path, stream.index) as (container, same):
        packets = (packet for packet in container.demux(same) if packet.dts is not None)
        packet = next(packets)
        taken = 0 if packet.dts >= first.dts else 1 + sum(1 for _ in takewhile(lambda p: p.dts < first.dts, packets))
        return float(packet.dts * packet.time_base), taken


class Clock:
    """Turns the times written in a file into seconds on the file's clock, which only go forward.

    A frame up to `JITTER` in the past is left out. A frame further back than that begins a part whose clock was
    restarted (recordings joined): it follows what was shown, and so does the rest. Unless it is that far before its own
    decoding time as well: then its time is wrong, and it is left out.
    """

    def __init__(self, film: Film) -> None:
        self._film = film
        self.now = film.times.begin
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
        self._decoding = 0.0
        """Decoding time of the frame placed last."""

    def place(self, frame: Any) -> float | None:
        """When `frame`, the next decoded, comes on screen; None: it is not shown. Raises `VideoError` for a jump."""
        written = self._written(frame)
        if written is None:
            return None
        if self._zero is None:
            # By decoding times, the packet that brings the first frame may be later than its fellows.
            self._zero = written - self.now if self._film.times.delay is None else self._film.times.zero
            self._duration = _duration(frame)
            return self.now
        time = written - self._zero
        if self._former is not None and time > self.now + JITTER and 0 <= written - sum(self._former) <= JITTER:
            # What looked like a restart were frames that a decoder, thrown off by damage, let go of late.
            self._zero, self._former = self._former[0], None
            time = written - self._zero
        if time < self.now - JITTER:
            if frame.dts is not None and written < float(frame.dts * frame.time_base) - JITTER:
                return None
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
        times = self._film.times
        if times.rate is not None:
            self._count += 1
            return float((self._count - 1) / times.rate)
        if times.delay is None:
            return frame.time
        if frame.dts is None:  # of the last frames, which no packet brings out of the decoder
            self._decoding += self._duration or self.stay
        else:
            self._decoding = float(frame.dts * frame.time_base)
        return self._decoding - times.delay

    def _check_jump(self, time: float) -> None:
        """A damaged time must not fill the video with one picture; a picture shown long within its length may."""
        film = self._film
        if film.tolerance is None or film.end is None or self.restarted:
            latest, allowed, states = 0.0, JUMP, "and the file does not say how long it is"
        else:
            # What is stated may count from zero of the times written, which the file's clock does not.
            latest = film.end + film.tolerance + max(0.0, film.times.zero)
            allowed, states = film.tolerance, f"past the {film.end:.2f} s the file says it lasts"
        if time > latest and time - self.now > allowed:
            raise cut_short(
                film.path, self.now, f"the next frame is written as {time - self.now:.2f} s later, {states}"
            )


def _duration(frame: Any) -> float:
    return float((frame.duration or 0) * frame.time_base) if frame.time_base else 0.0
