"""When the picture of a video file ends: as the file states or, if that is unusable, according to its packets."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from tieredkv.video import pyav as av
from tieredkv.video.container import MATROSKA, MP4, opened
from tieredkv.video.matroska import cut_element
from tieredkv.video.mp4 import edited_end, fragments
from tieredkv.video.salvage import Salvage

JITTER = 1.0
"""Seconds. A frame up to this much earlier than the one before is left out; beyond that the clock was restarted."""
JUMP = 600.0
"""Seconds a frame may be later than the one before it in a file that states no length."""
SAME_TIME = 1e-4
"""Seconds. A frame at most this much after a sampling time counts as shown at it: container clocks are rounded."""

_GUESSED = {"mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc"}
"""Formats that state no length. FFmpeg guesses one from the last timestamp or the bit rate, which is wrong for joined
recordings."""
_PER_TRACK = {MP4, "avi", "mxf"}
"""Formats that state the length of each track. For others FFmpeg reports the longest track's for all."""
_FROM_ZERO = {MATROSKA, "flv"}
"""Formats whose stated length is the time at which the video ends, even if it begins later than 0."""
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
"""GUID of the object of an ASF file that states its length."""
_LONGEST = 30 * 86400
"""Seconds. A longer stated length is a damaged number."""
_TOLERANCE = 1.0
"""Seconds by which the last frame may miss the stated end."""


@dataclass(frozen=True, slots=True)
class Times:
    """What the timestamps of a file mean."""

    zero: float
    """The timestamp, in seconds, that players show as 0: where the first of the file's streams begins."""
    begin: float
    """Seconds after `zero` at which the first frame is shown."""
    delay: float | None
    """For a file without presentation times: seconds by which a frame is shown before the decoding time of the packet
    that makes the decoder return it. None: frames have presentation times."""
    rate: Fraction | None
    """Frames per second of a file without any times; None: it has some."""


class Length(NamedTuple):
    end: float | None
    """Seconds, on the file's clock, at which the picture ends; None: unknown."""
    tolerance: float | None
    """Seconds by which the video may end earlier or later; None: the file states no length."""
    cut: str | None = None
    """Why the end of the file must be missing, if its stated length does not show that."""


def find_length(
    path: Path, container: Any, stream: Any, times: Times, until: float | None, check: Callable[[], None] | None
) -> Length:
    """When the picture of an open file ends; reads all packets if that is not stated for the picture itself.

    until: reading stops at this time. check: called for every packet; may raise to stop.
    """
    kind, single = container.format.name, len(container.streams) == 1

    def scan(everything: bool = False) -> _Packets:
        return _scan(path, stream.index, times, everything, until, check)

    if kind in _GUESSED or times.rate is not None:
        return Length(scan().end, None)
    track = _seconds(stream.duration, stream.time_base)
    longest = _seconds(container.duration, Fraction(1, av.time_base))
    if kind == "asf":
        header = _asf_seconds(path)
        longest = header if header is not None and header < _LONGEST else longest
    if kind == MP4:
        fragmented, cut, indexed = fragments(path, stream.id)
        if fragmented:
            # FFmpeg reports the sum of the fragments that exist, or what an index of all of them says.
            packets = scan()
            if indexed is not None and indexed < _LONGEST:
                track = times.zero + times.begin + indexed  # the index may have another zero than the fragments
            if packets.end is not None and packets.complete and track is not None:
                if packets.end + times.zero < track - _TOLERANCE:
                    return Length(track - times.zero, _TOLERANCE)
                return Length(packets.end, _TOLERANCE, cut)
            return Length(packets.end, None, cut)
        # Not FFmpeg's length of a track: it may or may not include empty time that edits leave before it.
        edited = edited_end(path, stream.id)
        if edited is not None and times.begin < edited - times.zero < _LONGEST:
            return Length(edited - times.zero, _TOLERANCE)
    if kind == "avi" and stream.frames and stream.average_rate:
        # FFmpeg shortens the length of a truncated file, but not its frame count.
        if stream.frames / stream.average_rate > _LONGEST:
            return Length(scan().end, None)  # the writer did not know the count
        track = max(track or 0.0, float(stream.frames / stream.average_rate))
    if kind in _PER_TRACK and track is not None:
        return Length(times.begin + track, _TOLERANCE)
    shift = times.zero if kind in _FROM_ZERO else 0.0
    tag = _clock_seconds(stream.metadata.get("DURATION")) if kind == MATROSKA else None
    if tag is None and longest is None:
        return Length(scan().end, None, cut_element(path) if kind == MATROSKA else None)
    from_start = times.begin + shift < _TOLERANCE  # then the end equals the length, within the tolerance
    if from_start and (tag is not None or single):
        end = longest if tag is None else tag
        assert end is not None
        return Length(end - shift - (times.delay or 0.0), _TOLERANCE)  # files that FFmpeg writes include the delay
    return _from_packets(scan(everything=True), tag, longest, shift, kind)


def there(
    length: Length, path: Path, index: int, times: Times, until: float | None, check: Callable[[], None] | None
) -> tuple[Length, tuple[float, float] | None]:
    """The length of a damaged file up to its last packet, and from when to when the rest is missing.

    Reads all packets; arguments as for `find_length`.
    """
    packets = _scan(path, index, times, False, until, check, skip_damaged=True)
    slack = _TOLERANCE if length.tolerance is None else length.tolerance
    if packets.end is None or not packets.complete or (length.end is not None and packets.end > length.end - slack):
        return length, None
    return Length(packets.end, slack), None if length.end is None else (packets.end, length.end)


def _from_packets(packets: _Packets, tag: float | None, longest: float | None, shift: float, kind: str) -> Length:
    """The end according to the packets, unless they stop before the end stated for the picture or for all streams."""
    if packets.end is None:
        return Length(None, None)
    slack = _TOLERANCE if kind in _FROM_ZERO or longest is None else max(5.0, 0.1 * longest)  # others state estimates
    if packets.complete:
        for seconds, reached in ((tag, packets.end), (longest, packets.last)):
            if seconds is not None and reached < seconds - shift - slack:
                return Length(seconds - shift, slack)
    return Length(packets.end, slack)


class _Packets(NamedTuple):
    end: float | None
    """End of the picture, in seconds on the file's clock; None: its packets have no times."""
    last: float
    """End of the last of the streams that were read."""
    complete: bool
    """Whether the file was read to its end."""


def _scan(
    path: Path,
    index: int,
    times: Times,
    everything: bool,
    until: float | None,
    check: Callable[[], None] | None,
    skip_damaged: bool = False,
) -> _Packets:
    """Ends according to the packets' times, without decoding any; reads all streams if `everything`.

    Applies the rules of `Clock` as far as packets in decoding order allow: a restart of the clock shows only at a key
    frame.
    """
    length, newest, zero, count, last = times.begin, None, times.zero, 0, 0.0
    complete = True
    with opened(path, index) as (container, stream):
        try:
            if skip_damaged:
                packets = Salvage(container, stream).packets()
            else:
                packets = container.demux() if everything else container.demux(stream)
            for packet in packets:
                if check is not None:
                    check()
                timestamp = packet.pts if times.delay is None else packet.dts
                if packet.size == 0:
                    continue
                count += packet.stream_index == index
                if timestamp is None or packet.time_base is None:
                    continue
                time, shown = float(timestamp * packet.time_base), float((packet.duration or 0) * packet.time_base)
                if packet.stream_index != index:
                    last = max(last, time + shown - times.zero)
                    continue
                time -= zero
                if newest is not None and packet.is_keyframe and time < newest - JITTER:
                    zero += time - length
                    newest = time = length
                if newest is not None and time - newest > JUMP:
                    complete = False
                    break
                newest = time if newest is None else max(newest, time)
                length = max(length, time + shown)
                if until is not None and length > until + JITTER:
                    complete = False
                    break
        except (av.FFmpegError, OSError, IndexError):  # IndexError as in `decoded`
            pass  # decoding fails at the same place, and reports it
    if times.rate is not None:
        end = float(count / times.rate)
        return _Packets(end, end, complete)
    if newest is None:
        return _Packets(None, last, complete)
    end = max(length, times.begin + SAME_TIME)
    return _Packets(end, max(last, end), complete)


def _asf_seconds(path: Path) -> float | None:
    """Length that an ASF file states, which FFmpeg does not report of a truncated one; None: it states none."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    at = head.find(_ASF_FILE_PROPERTIES)
    if at < 0 or len(head) < at + 92:
        return None
    playing, preroll, flags = struct.unpack_from("<Q8xQI", head, at + 64)
    seconds = playing / 1e7 - preroll / 1e3
    return seconds if seconds > 0 and not flags & 1 else None  # flag 1: a broadcast of unknown length


def _seconds(duration: int | None, unit: Fraction | None) -> float | None:
    if duration is None or unit is None:
        return None
    seconds = float(duration * unit)
    return seconds if 0 < seconds < _LONGEST else None


def _clock_seconds(text: str | None) -> float | None:
    """Seconds in Matroska's form "00:01:02.500000000"; None if it is damaged."""
    try:
        hours, minutes, seconds = (text or "").split(":")
        total = 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return None
    return total if 0 < total < _LONGEST else None
