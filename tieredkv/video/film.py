"""Film: what is known about a video file before it is decoded.

All times are seconds on the file's own clock, as players show it: 0 is where the first of its streams begins, which may
be audio.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from tieredkv.errors import VideoError
from tieredkv.video import pyav as av
from tieredkv.video.container import (
    MATROSKA,
    MP4,
    cut_short,
    decoded,
    is_still,
    opened,
    reason,
    unreadable,
    video_streams,
)
from tieredkv.video.length import Times, find_length, there
from tieredkv.video.picture import Geometry, Painter
from tieredkv.video.salvage import Salvage

_INDEXED = {MP4, MATROSKA}
"""Formats with an index of key frames, which FFmpeg uses for seeking."""
_DECODING_TIMES = {"avi", "asf"}
"""Formats that store only decoding times. FFmpeg guesses presentation times, wrongly if it does not expect B-frames."""
_MOST_TIMELESS = 50
"""If this many frames at the beginning have no time, the file is treated as having none."""
_ORDER_CHECKED = 8
"""Frames after the first whose times are checked for order in a file with B-frames."""


@dataclass(frozen=True, slots=True)
class Film:
    """What is known about a video file once its first frame is decoded."""

    path: Path
    stream: int
    """Index of the stream to show."""
    width: int
    height: int
    """Size of the first frame as it is shown: with square pixels, rotated upright."""
    geometry: Geometry
    times: Times
    end: float | None
    """When the last frame ends, as stated or else as found in the packets."""
    tolerance: float | None
    """Seconds by which the video may end earlier or later; None: the file states no length."""
    cut: str | None
    """Why the end of the file must be missing, if its stated length does not show that."""
    indexed: bool
    """Whether decoding can start at any key frame."""
    file_bytes: int
    skip_damaged: bool = False
    missing: tuple[float, float] | None = None
    """With `skip_damaged`: from the end of the last picture to the end that the file states."""


def probe(
    path: Path, end: float | None = None, check: Callable[[], None] | None = None, skip_damaged: bool = False
) -> Film:
    """Decode the first frame of `path` and find its length, without reading further if the file states it.

    end: a search for the length stops at this time. check: called for every packet of the search; may raise to stop.
    skip_damaged: go over damage, and read all packets to find the last picture that there is. Raises `VideoError` if
    no frame can be decoded.
    """
    try:
        size = os.path.getsize(path)
    except OSError as error:
        raise unreadable(path, error) from None
    for index in video_streams(path):
        with opened(path, index) as (container, stream):
            if is_still(container):
                raise VideoError(f"{path}: a still picture, no video: give it in a list, as a picture.")
            beginning = _beginning(path, container, stream, skip_damaged)
            if beginning is None:
                if stream.frames:
                    break  # its frames were in a part of the file that is missing
                continue
            geometry = Geometry.of(path, container, stream)
            times = _times(path, container, stream, beginning)
            length = find_length(path, container, stream, times, end, check)
            missing = None
            if skip_damaged:
                length, missing = there(length, path, index, times, end, check)
            try:
                height, width, _ = Painter(path, geometry).paint(beginning.first).shape
            except (av.FFmpegError, OSError, ValueError) as error:
                raise unreadable(path, error) from None
            indexed = container.format.name in _INDEXED and times.rate is None and times.delay is None
            return Film(path, index, width, height, geometry, times, *length, indexed, size, skip_damaged, missing)
    raise VideoError(f"{path}: its video stream has no frame.")


class _Beginning(NamedTuple):
    first: Any
    """The first frame with a time or, if none has one, the first."""
    by_decoding: bool
    """Whether only decoding times give the order of the frames."""


def _beginning(path: Path, container: Any, stream: Any, skip_damaged: bool) -> _Beginning | None:
    """The first frame, and which times to trust; None if there is no frame."""
    by_decoding = container.format.name in _DECODING_TIMES
    first, timeless, shown, decoding = None, 0, [], []
    try:
        for frame in Salvage(container, stream) if skip_damaged else decoded(container, stream):
            time = frame.dts if by_decoding else frame.pts
            if first is None or (time is not None and not shown):
                first = frame
            timeless += time is None
            if time is not None:
                shown.append(time)
                decoding.append(frame.dts)
            enough = 1 + (_ORDER_CHECKED if stream.codec_context.has_b_frames and not by_decoding else 0)
            if len(shown) >= enough or (not shown and timeless == _MOST_TIMELESS):
                break
    except (av.FFmpegError, OSError) as error:
        if first is None:
            raise cut_short(path, 0.0, reason(error)) from None
    if first is None:
        return None
    # One time out of order may be damage; two of eight mean a file without presentation times.
    if not by_decoding and _backward(shown) >= 2 and None not in decoding and not _backward(decoding):
        by_decoding = True
    return _Beginning(first, by_decoding and bool(shown))


def _backward(times: list[int]) -> int:
    """How often a time does not increase."""
    return sum(after <= before for before, after in pairwise(times))


def _times(path: Path, container: Any, stream: Any, beginning: _Beginning) -> Times:
    first, delay = beginning.first, None
    if beginning.by_decoding:
        earliest, packets = _first_packets(path, stream, first)
        delay = max(0.0, float(first.dts * first.time_base) - earliest)
        if stream.average_rate:  # at most the length of these packets, between which pictures may be missing
            delay = min(delay, float(packets / stream.average_rate))
    elif first.time is None:
        # FFmpeg guesses from the frames; its average rate of a raw stream is a default, 25.
        return Times(0.0, 0.0, None, Fraction(stream.guessed_rate or stream.average_rate or 25))
    else:
        earliest = first.time
    zero = earliest if container.start_time is None else min(earliest, container.start_time / av.time_base)
    return Times(zero, earliest - zero, delay, None)


def _first_packets(path: Path, stream: Any, first: Any) -> tuple[float, int]:
    """Decoding time in seconds of the stream's first packet, and how many packets precede the one of `first`."""
    with opened(path, stream.index) as (container, same):
        packets = (packet for packet in container.demux(same) if packet.dts is not None)
        packet = next(packets)
        count = 0 if packet.dts >= first.dts else 1 + sum(1 for _ in takewhile(lambda p: p.dts < first.dts, packets))
        return float(packet.dts * packet.time_base), count
