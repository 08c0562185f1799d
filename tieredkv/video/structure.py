"""What PyAV does not tell of a file: whether all fragments of an MP4 are there, and which margins are not shown."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
MATROSKA = "matroska,webm"

Margins = tuple[int, int, int, int]
"""Stored pixels that are not shown: at the top, the bottom, the left and the right."""
NO_MARGINS = (0, 0, 0, 0)

_TRACK_TO_FORMAT = (b"mdia", b"minf", b"stbl", b"stsd")
_VISUAL_ENTRY = 78
"""Bytes of a description of pictures before the boxes in it."""
_OPENING = (b"styp", b"sidx", b"prft", b"moof")
"""Boxes that are followed by the rest of their fragment."""
_FRAGMENT = (*_OPENING, b"ssix", b"emsg", b"uuid", b"mdat")
_NO_KIND = bytes(4)
"""Where a box should be, but zeros are."""
_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
"""The kind of the object of an ASF file that tells its length."""
_PADDING = 1 << 16
"""Bytes of zeros at the end of a file that may be no more than padding."""
_SEGMENT, _TRACKS, _TRACK, _VIDEO, _CLUSTER = 0x18538067, 0x1654AE6B, 0xAE, 0xE0, 0x1F43B675
_PLACES = {
    *(_SEGMENT, _TRACKS, _CLUSTER, 0x1A45DFA3, 0x114D9B74, 0x1549A966, 0x1C53BB6B, 0x1043A770, 0x1941A469, 0x1254C367),
    *(0xE7, 0x5854, 0xA7, 0xAB, 0xA3, 0xA0, 0xAF, 0xEC, 0xBF),
}
"""What may stand in a Matroska file: at its top and in its segment, and in a cluster."""
_BEGINNINGS = [kind.to_bytes((kind.bit_length() + 7) // 8, "big") for kind in _PLACES]
_LONGEST_HEAD = 12
"""Bytes that the kind and the size of an element take at most."""
_PIXEL_CROP = (0x54BB, 0x54AA, 0x54CC, 0x54DD)
"""Matroska's margins: at the top, the bottom, the left and the right."""


class Part(NamedTuple):
    """A box of an MP4, or an element of Matroska: its kind, and where in the file its content begins and ends."""

    kind: bytes | int
    begin: int
    end: int


class Fragments(NamedTuple):
    """What the boxes of an MP4 tell of its fragments."""

    found: bool
    cut: str | None
    """What shows that the last of them is not all there."""
    promised: float | None
    """Seconds of the track that an index says they hold; None: no index says."""


def fragments(path: Path, track: int) -> Fragments:
    """Of an MP4 and the track of this number."""
    fragmented, size, last, promised = False, os.path.getsize(path), Part(b"", 0, 0), 0.0
    with path.open("rb") as file:
        for box in boxes(file, 0, size):
            if box.kind == _NO_KIND:
                break
            last = box
            fragmented |= last.kind == b"moof"
            if last.kind == b"sidx":
                promised = max(promised, _indexed_seconds(file, last, track))
        rest = size - last.end
        broken = last.kind in _OPENING or (rest < 0 and last.kind in _FRAGMENT) or 0 < rest < 8
        broken |= last.kind in _FRAGMENT and _ends_in_zeros(file, last.end, size)
    cut = "its last fragment is not all there" if fragmented and broken else None
    return Fragments(fragmented, cut, promised or None)


def cut_element(path: Path) -> str | None:
    """What shows that the last element of a Matroska file is not all there."""
    at, size, cut = 0, os.path.getsize(path), False
    with path.open("rb") as file:
        while at < size:
            part = next(elements(file, at, size), None)
            if part is None or part.kind not in _PLACES:
                file.seek(at)
                rest = file.read(_LONGEST_HEAD)
                begun = len(rest) < _LONGEST_HEAD and any(kind.startswith(rest[: len(kind)]) for kind in _BEGINNINGS)
                cut = begun or _ends_in_zeros(file, at, size)  # anything else is damage, which decoding tells of
                break
            # Those of unknown size are gone into, and so is the segment: its size says no more than its last part's.
            inside = part.kind == _SEGMENT or (part.kind == _CLUSTER and part.end == size)
            at = part.begin if inside else part.end
    return "its last cluster is not all there" if cut or at > size else None


def edited_end(path: Path, track: int) -> float | None:
    """Seconds on the clock of an MP4 at which its edit list ends the track of this number; None: it has none."""
    try:
        with path.open("rb") as file:
            movie = _inside(file, Part(b"", 0, os.path.getsize(path)), b"moov")
            unit = _timed(file, _inside(file, movie, b"mvhd"))[0]
            for box in boxes(file, *movie[1:]):
                if box.kind == b"trak" and _number(file, _inside(file, box, b"tkhd")) == track:
                    media_unit, media = _timed(file, _inside(file, box, b"mdia", b"mdhd"))
                    return _sum_of_edits(file, _inside(file, box, b"edts", b"elst"), unit, media, media_unit)
    except (OSError, ValueError, ZeroDivisionError, struct.error):  # damaged, or without a list
        pass
    return None


def asf_seconds(path: Path) -> float | None:
    """How long an ASF file says it is, which FFmpeg leaves out of one that was cut; None: it does not say."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    at = head.find(_FILE_PROPERTIES)
    if at < 0 or len(head) < at + 92:
        return None
    playing, preroll, flags = struct.unpack_from("<Q8xQI", head, at + 64)
    seconds = playing / 1e7 - preroll / 1e3
    return seconds if seconds > 0 and not flags & 1 else None  # 1: a broadcast, of which it was not known


def margins(path: Path, kind: str, stream: int) -> Margins:
    """What the container leaves away of the pictures of its stream of this index."""
    find = {MP4: _clean_aperture, MATROSKA: _pixel_crop}.get(kind)
    if find is None:
        return NO_MARGINS
    try:
        with path.open("rb") as file:
            return find(file, os.path.getsize(path), stream)
    except (OSError, ValueError, ZeroDivisionError, struct.error):  # damaged: the pictures are read as they are stored
        return NO_MARGINS


def boxes(file: BinaryIO, at: int, end: int) -> Iterator[Part]:
    """The boxes of an MP4 between two bytes. The last may say that it ends after them."""
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
        yield Part(head[4:8], at + header, at + length)
        at += length


def elements(file: BinaryIO, at: int, end: int) -> Iterator[Part]:
    """The elements of Matroska between two bytes."""
    while at + 2 <= end:
        file.seek(at)
        head = file.read(_LONGEST_HEAD)
        id_size, size_size = 9 - head[0].bit_length(), 0
        if len(head) > id_size:
            size_size = 9 - head[id_size].bit_length()
        if id_size > 4 or not 1 <= size_size <= 8 or len(head) < id_size + size_size:
            return
        bits = 7 * size_size
        length = int.from_bytes(head[id_size : id_size + size_size], "big") & ((1 << bits) - 1)
        begin = at + id_size + size_size
        at = end if length == (1 << bits) - 1 else begin + length  # all ones: not known when it was written
        yield Part(int.from_bytes(head[:id_size], "big"), begin, at)


def _ends_in_zeros(file: BinaryIO, at: int, size: int) -> bool:
    """Whether nothing follows but the room that a download took beforehand."""
    if size - at <= _PADDING:
        return False
    file.seek(size - _PADDING)
    return not any(file.read())


def _indexed_seconds(file: BinaryIO, index: Part, track: int) -> float:
    """How long the fragments are that an index of this track lists; 0: it is none, or is damaged."""
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


def _inside(file: BinaryIO, box: Part, *kinds: bytes) -> Part:
    """The first box of each kind within the one before. Raises `ValueError` if there is none."""
    for kind in kinds:
        found = next((inner for inner in boxes(file, *box[1:]) if inner.kind == kind), None)
        if found is None:
            raise ValueError
        box = found
    return box


def _number(file: BinaryIO, header: Part) -> int:
    """The number that follows the two dates at the beginning of a header: a track's own, or units per second."""
    file.seek(header.begin)
    head = file.read(24)
    number: int = struct.unpack_from(">I", head, 20 if head[:1] == b"\1" else 12)[0]
    return number


def _timed(file: BinaryIO, header: Part) -> tuple[int, int]:
    """Units per second, and the duration in them."""
    file.seek(header.begin)
    head = file.read(32)
    unit, duration = struct.unpack_from(">IQ", head, 20) if head[:1] == b"\1" else struct.unpack_from(">2I", head, 12)
    return unit, duration


def _sum_of_edits(file: BinaryIO, edits: Part, unit: int, media: int, media_unit: int) -> float:
    """Seconds of all edits, the empty ones included; what one asks for that is far past the media is not shown."""
    file.seek(edits.begin)
    version, count = struct.unpack(">B3xI", file.read(8))
    entry, total = struct.Struct(">QqI" if version == 1 else ">IiI"), Fraction(0)
    for _ in range(min(count, (edits.end - edits.begin - 8) // entry.size)):
        duration, begin, _rate = entry.unpack(file.read(entry.size))
        seconds, rest = Fraction(duration, unit), Fraction(media - begin, media_unit)
        if begin >= 0 and media:
            # The media's length is one of decoding: frames may be shown a little after it. 0: all that is left.
            seconds = seconds if duration and seconds <= rest + 1 else max(Fraction(0), rest)
        total += seconds
    return float(total)


def _clean_aperture(file: BinaryIO, size: int, stream: int) -> Margins:
    """Of an MP4's "clap" box: the part of the picture that is shown, by its size and how far its middle is moved."""
    movie = next((box for box in boxes(file, 0, size) if box.kind == b"moov"), None)
    tracks = [] if movie is None else [box for box in boxes(file, *movie[1:]) if box.kind == b"trak"]
    if stream >= len(tracks):
        return NO_MARGINS
    place = tracks[stream]
    for kind in _TRACK_TO_FORMAT:
        inside = next((box for box in boxes(file, *place[1:]) if box.kind == kind), None)
        if inside is None:
            return NO_MARGINS
        place = inside
    entry = next(boxes(file, place.begin + 8, place.end))
    file.seek(entry.begin + 24)
    stored = struct.unpack(">2H", file.read(4))
    for box in boxes(file, entry.begin + _VISUAL_ENTRY, entry.end):
        if box.kind == b"clap":
            file.seek(box.begin)
            numbers = struct.unpack(">8i", file.read(32))
            width, height, right, down = (Fraction(n, d) for n, d in zip(numbers[::2], numbers[1::2], strict=True))
            return _sides(stored[1], height, down) + _sides(stored[0], width, right)
    return NO_MARGINS


def _pixel_crop(file: BinaryIO, size: int, stream: int) -> Margins:
    """Of Matroska's PixelCrop elements."""
    segment = next((part for part in elements(file, 0, size) if part.kind == _SEGMENT), None)
    if segment is None:
        return NO_MARGINS
    for part in elements(file, segment.begin, min(segment.end, size)):
        if part.kind == _CLUSTER:
            break
        if part.kind == _TRACKS:
            tracks = [track for track in elements(file, *part[1:]) if track.kind == _TRACK]
            found = dict.fromkeys(_PIXEL_CROP, 0)
            for video in elements(file, *tracks[stream][1:]) if stream < len(tracks) else ():
                if video.kind == _VIDEO:
                    for number in elements(file, *video[1:]):
                        if number.kind in found:
                            file.seek(number.begin)
                            found[number.kind] = int.from_bytes(file.read(min(8, number.end - number.begin)), "big")
            top, bottom, left, right = found.values()
            return top, bottom, left, right
    return NO_MARGINS


def _sides(stored: int, shown: Fraction, moved: Fraction) -> tuple[int, int]:
    """What is left away before and after the part that is shown, of a whole number of pixels."""
    before = math.floor((stored - shown) / 2 + moved)
    after = stored - math.floor(shown) - before
    if min(before, after) < 0 or shown < 1:
        raise ValueError
    return before, after
