"""When the picture of a video file ends: by what the file states or, where that is no help, by its packets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av

from tieredkv.video.container import opened
from tieredkv.video.structure import MATROSKA, MP4, asf_seconds, cut_element, edited_end, fragments

JITTER = 1.0
"""Seconds a frame's time may run backwards: it is left out. Further back, the file's clock has been restarted."""
JUMP = 600.0
"""Seconds a frame may be later than the one before it in a file that does not say how long it is."""
SAME_TIME = 1e-4
"""Seconds: a frame this little after a sampling time still counts as shown at it (container clocks round)."""

_GUESSED = {"mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc"}
"""Formats that state no length. FFmpeg guesses one from the last time written or the bit rate, which is wrong where
recordings were joined."""
_PER_TRACK = {MP4, "avi", "mxf"}
"""Formats that state the length of each track. For the others FFmpeg gives that of the longest as everyone's."""
_FROM_ZERO = {MATROSKA, "flv"}
"""Formats whose stated length is the time the video ends, whenever it begins."""
_LONGEST = 30 * 86400
"""Seconds: a stated length above this is a damaged number."""
_TOLERANCE = 1.0
"""Seconds by which the last frame may miss the end that is stated."""


@dataclass(frozen=True, slots=True)
class Times:
    """What the times written in a file stand for."""

    zero: float
    """The time written that players show as 0: where the first of the file's streams begins."""
    begin: float
    """Seconds after that at which the first frame is shown."""
    delay: float | None
    """Frames of a file that stores no times of showing are shown this long before the decoding time of the packet that
    brings them out of the decoder; None: they have times of their own."""
    rate: Fraction | None
    """Frames per second of a file whose frames have no times at all; None: they have."""


class Length(NamedTuple):
    end: float | None
    """Seconds, on the file's clock, at which the picture ends; None: nothing tells."""
    tolerance: float | None
    """Seconds the video may end before or after that; None: the file states no length."""
    cut: str | None = None
    """What shows that the end of the file is missing, where its stated length does not."""


def find_length(
    path: Path, container: Any, stream: Any, times: Times, until: float | None, check: Callable[[], None] | None
) -> Length:
    """Where the picture of an open file ends; reads all packets if that is not stated for the picture itself.

    until: time after which nothing is needed: reading stops there, or where `check`, called for every packet, raises.
    """
    kind, alone = container.format.name, len(container.streams) == 1

    def read(everything: bool = False) -> _Found:
        return _scan(path, stream.index, times, everything, until, check)

    if kind in _GUESSED or times.rate is not None:
        return Length(read().end, None)
    own = _seconds(stream.duration, stream.time_base)
    whole = _seconds(container.duration, Fraction(1, av.time_base))
    if kind == "asf":
        stated_by_file = asf_seconds(path)
        whole = stated_by_file if stated_by_file is not None and stated_by_file < _LONGEST else whole
    if kind == MP4:
        fragmented, cut, promised = fragments(path, stream.id)
        if fragmented:
            # What FFmpeg knows of is what the fragments that are there add up to, or an index of all of them.
            found = read()
            if promised is not None and promised < _LONGEST:
                own = times.zero + times.begin + promised  # an index may count from another zero than its fragments
            if found.end is not None and found.complete and own is not None:
                if found.end + times.zero < own - _TOLERANCE:
                    return Length(own - times.zero, _TOLERANCE)
                return Length(found.end, _TOLERANCE, cut)
            return Length(found.end, None, cut)
        # FFmpeg's length of a track is no help where edits leave time empty before it: it may count that in, or not.
        edited = edited_end(path, stream.id)
        if edited is not None and times.begin < edited - times.zero < _LONGEST:
            return Length(edited - times.zero, _TOLERANCE)
    if kind == "avi" and stream.frames and stream.average_rate:
        # FFmpeg shortens the length of a file that was cut, but not the count.
        if stream.frames / stream.average_rate > _LONGEST:
            return Length(read().end, None)  # the count was not known when the file was written
        own = max(own or 0.0, float(stream.frames / stream.average_rate))
    if kind in _PER_TRACK and own is not None:
        return Length(times.begin + own, _TOLERANCE)
    shift = times.zero if kind in _FROM_ZERO else 0.0
    stated = _clock_seconds(stream.metadata.get("DURATION")) if kind == MATROSKA else None
    if stated is None and whole is None:
        return Length(read().end, None, cut_element(path) if kind == MATROSKA else None)
    prompt = times.begin + shift < _TOLERANCE  # then the end and the length are the same to within the tolerance
    if prompt and (stated is not None or alone):
        end = whole if stated is None else stated
        assert end is not None
        return Length(end - shift - (times.delay or 0.0), _TOLERANCE)  # FFmpeg's own files count the delay in
    return _compared(read(everything=True), stated, whole, shift, kind)


def _compared(found: _Found, stated: float | None, whole: float | None, shift: float, kind: str) -> Length:
    """The end found in the packets, unless they stop before what is stated for the picture or for all streams."""
    if found.end is None:
        return Length(None, None)
    slack = _TOLERANCE if kind in _FROM_ZERO or whole is None else max(5.0, 0.1 * whole)  # the rest are estimates
    if found.complete:
        for promised, reached in ((stated, found.end), (whole, found.last)):
            if promised is not None and reached < promised - shift - slack:
                return Length(promised - shift, slack)
    return Length(found.end, slack)


class _Found(NamedTuple):
    end: float | None
    """Of the picture, in seconds on the file's clock; None: its packets have no times."""
    last: float
    """Of all streams that were read."""
    complete: bool
    """Whether the file was read to its end."""


def _scan(
    path: Path,
    index: int,
    times: Times,
    everything: bool,
    until: float | None,
    check: Callable[[], None] | None,
) -> _Found:
    """Ends by the times of the packets, none of which is decoded; of all streams if `everything`.

    What `Clock` would make of the times is foreseen here, as far as packets, which come in the order of decoding, let
    it be: only at a key frame can the clock be seen to restart.
    """
    length, newest, zero, count, last = times.begin, None, times.zero, 0, 0.0
    complete = True
    with opened(path, index) as (container, stream):
        try:
            for packet in container.demux() if everything else container.demux(stream):
                if check is not None:
                    check()
                written = packet.pts if times.delay is None else packet.dts
                if packet.size == 0:
                    continue
                count += packet.stream_index == index
                if written is None or packet.time_base is None:
                    continue
                time, stays = float(written * packet.time_base), float((packet.duration or 0) * packet.time_base)
                if packet.stream_index != index:
                    last = max(last, time + stays - times.zero)
                    continue
                time -= zero
                if newest is not None and packet.is_keyframe and time < newest - JITTER:
                    zero += time - length
                    newest = time = length
                if newest is not None and time - newest > JUMP:
                    complete = False
                    break
                newest = time if newest is None else max(newest, time)
                length = max(length, time + stays)
                if until is not None and length > until + JITTER:
                    complete = False
                    break
        except (av.FFmpegError, OSError, IndexError):  # the last as in `decoded`
            pass  # decoding comes to the same place, and says which
    if times.rate is not None:
        end = float(count / times.rate)
        return _Found(end, end, complete)
    if newest is None:
        return _Found(None, last, complete)
    end = max(length, times.begin + SAME_TIME)
    return _Found(end, max(last, end), complete)


def _seconds(duration: int | None, unit: Fraction | None) -> float | None:
    if duration is None or unit is None:
        return None
    seconds = float(duration * unit)
    return seconds if 0 < seconds < _LONGEST else None


def _clock_seconds(text: str | None) -> float | None:
    """Of matroska's "00:01:02.500000000"."""
    try:
        hours, minutes, seconds = (text or "").split(":")
        total = 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return None
    return total if 0 < total < _LONGEST else None
