"""What PyAV does not report about an MP4: missing fragments, the end by its edit list, and the clean aperture."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

_VISUAL_ENTRY = 78
"""Bytes of a visual sample description before the boxes inside it."""
_OPENING = (b"styp", b"sidx", b"prft", b"moof")
"""Boxes that the rest of their fragment must follow."""
_FRAGMENT = (*_OPENING, b"ssix", b"emsg", b"uuid", b"mdat")
_NO_KIND = bytes(4)
"""The kind that is read where a file holds zeros instead of a box."""
_PADDING = 1 << 16
"""Most zero bytes at the end of a file that count as padding."""


class Box(NamedTuple):
    """A box: its kind, and where in the file its content begins and ends."""

    kind: bytes
    begin: int
    end: int


class Fragments(NamedTuple):
    """What the boxes of a file say about its fragments."""

    fragmented: bool
    cut: str | None
    """Why the last fragment must be incomplete."""
    indexed_seconds: float | None
    """Seconds of the track according to an index of the fragments; None: there is no index."""


def fragments(path: Path, track: int) -> Fragments:
    """The fragments of a file. track: number of the track that the index is about."""
    fragmented, size, last, seconds = False, os.path.getsize(path), Box(b"", 0, 0), 0.0
    with path.open("rb") as file:
        for box in boxes(file, 0, size):
            if box.kind == _NO_KIND:
                break
            last = box
            fragmented |= last.kind == b"moof"
            if last.kind == b"sidx":
                seconds = max(seconds, _indexed_seconds(file, last, track))
        rest = size - last.end
        broken = last.kind in _OPENING or (rest < 0 and last.kind in _FRAGMENT) or 0 < rest < 8
        broken |= last.kind in _FRAGMENT and ends_in_zeros(file, last.end, size)
    cut = "its last fragment is incomplete" if fragmented and broken else None
    return Fragments(fragmented, cut, seconds or None)


def edited_end(path: Path, track: int) -> float | None:
    """Seconds at which the edit list ends the track of this number; None: it has no list, or a damaged one."""
    try:
        with path.open("rb") as file:
            movie = _inside(file, Box(b"", 0, os.path.getsize(path)), b"moov")
            unit = _timed(file, _inside(file, movie, b"mvhd"))[0]
            for box in boxes(file, *movie[1:]):
                if box.kind == b"trak" and _number(file, _inside(file, box, b"tkhd")) == track:
                    media_unit, media = _timed(file, _inside(file, box, b"mdia", b"mdhd"))
                    return _sum_of_edits(file, _inside(file, box, b"edts", b"elst"), unit, media, media_unit)
    except (OSError, ValueError, ZeroDivisionError, struct.error):
        pass
    return None


class Aperture(NamedTuple):
    """The part of a picture that is shown, in pixels. right, down: from the picture's centre to the part's."""

    stored_width: int
    stored_height: int
    width: Fraction
    height: Fraction
    right: Fraction
    down: Fraction


def clean_aperture(file: BinaryIO, size: int, stream: int) -> Aperture | None:
    """The "clap" box of the stream with this index; None if it has none.

    Raises `ValueError`, `ZeroDivisionError` or `struct.error` for a damaged file.
    """
    movie = _inside(file, Box(b"", 0, size), b"moov")
    tracks = [box for box in boxes(file, *movie[1:]) if box.kind == b"trak"]
    if stream >= len(tracks):
        return None
    formats = _inside(file, tracks[stream], b"mdia", b"minf", b"stbl", b"stsd")
    entry = next(boxes(file, formats.begin + 8, formats.end), None)
    if entry is None:
        return None
    file.seek(entry.begin + 24)
    stored = struct.unpack(">2H", file.read(4))
    for box in boxes(file, entry.begin + _VISUAL_ENTRY, entry.end):
        if box.kind == b"clap":
            file.seek(box.begin)
            numbers = struct.unpack(">8i", file.read(32))
            return Aperture(*stored, *(Fraction(n, d) for n, d in zip(numbers[::2], numbers[1::2], strict=True)))
    return None


def boxes(file: BinaryIO, at: int, end: int) -> Iterator[Box]:
    """The boxes between two positions in a file. The last may claim to end later."""
    while at + 8 <= end:
        file.seek(at)
        head, header = file.read(16), 8
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length, header = int.from_bytes(head[8:16], "big"), 16
        elif length == 0:
            length = end - at
        if length < header:
            return
        yield Box(head[4:8], at + header, at + length)
        at += length


def ends_in_zeros(file: BinaryIO, at: int, size: int) -> bool:
    """Whether the file from `at` on is space that a download reserved and did not fill."""
    if size - at <= _PADDING:
        return False
    file.seek(size - _PADDING)
    return not any(file.read())


def _indexed_seconds(file: BinaryIO, index: Box, track: int) -> float:
    """Length of the fragments that an index of this track lists; 0 for another track's or a damaged one."""
    file.seek(index.begin)
    head = file.read(12)
    file.seek(index.begin + (28 if head[:1] == b"\1" else 20))
    count = file.read(4)[2:]
    entries = file.read(12 * int.from_bytes(count, "big"))
    if len(head) < 12 or struct.unpack_from(">I", head, 4)[0] != track:
        return 0.0
    whole = entries[: len(entries) // 12 * 12]
    total, unit = sum(entry[1] for entry in struct.iter_unpack(">3I", whole)), struct.unpack_from(">I", head, 8)[0]
    return total / unit if unit else 0.0


def _inside(file: BinaryIO, box: Box, *kinds: bytes) -> Box:
    """The first box of each kind within the one before. Raises `ValueError` if there is none."""
    for kind in kinds:
        found = next((inner for inner in boxes(file, *box[1:]) if inner.kind == kind), None)
        if found is None:
            raise ValueError
        box = found
    return box


def _number(file: BinaryIO, header: Box) -> int:
    """The number after the two dates at the beginning of a header: a track's own, or units per second."""
    file.seek(header.begin)
    head = file.read(24)
    number: int = struct.unpack_from(">I", head, 20 if head[:1] == b"\1" else 12)[0]
    return number


def _timed(file: BinaryIO, header: Box) -> tuple[int, int]:
    """Units per second, and the duration in them."""
    file.seek(header.begin)
    head = file.read(32)
    unit, duration = struct.unpack_from(">IQ", head, 20) if head[:1] == b"\1" else struct.unpack_from(">2I", head, 12)
    return unit, duration


def _sum_of_edits(file: BinaryIO, edits: Box, unit: int, media: int, media_unit: int) -> float:
    """Seconds of all edits, including empty ones; an edit far past the end of the media counts to that end."""
    file.seek(edits.begin)
    version, count = struct.unpack(">B3xI", file.read(8))
    entry, total = struct.Struct(">QqI" if version == 1 else ">IiI"), Fraction(0)
    for _ in range(min(count, (edits.end - edits.begin - 8) // entry.size)):
        duration, begin, _rate = entry.unpack(file.read(entry.size))
        seconds, rest = Fraction(duration, unit), Fraction(media - begin, media_unit)
        if begin >= 0 and media:
            # The media's length is in decoding times; frames may be shown a little after it. Duration 0: all the rest.
            seconds = seconds if duration and seconds <= rest + 1 else max(Fraction(0), rest)
        total += seconds
    return float(total)
