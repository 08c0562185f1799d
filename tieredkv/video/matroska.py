"""What PyAV does not report about a Matroska file: a missing end, and the margins that are not shown."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tieredkv.video.mp4 import ends_in_zeros

_SEGMENT, _TRACKS, _TRACK, _VIDEO, _CLUSTER = 0x18538067, 0x1654AE6B, 0xAE, 0xE0, 0x1F43B675
_KINDS = {
    *(_SEGMENT, _TRACKS, _CLUSTER, 0x1A45DFA3, 0x114D9B74, 0x1549A966, 0x1C53BB6B, 0x1043A770, 0x1941A469, 0x1254C367),
    *(0xE7, 0x5854, 0xA7, 0xAB, 0xA3, 0xA0, 0xAF, 0xEC, 0xBF),
}
"""Elements at the top of a file and in its segment, and those in a cluster."""
_KIND_BYTES = [kind.to_bytes((kind.bit_length() + 7) // 8, "big") for kind in _KINDS]
_LONGEST_HEAD = 12
"""Most bytes that the kind and the size of an element take."""
_PIXEL_CROP = (0x54BB, 0x54AA, 0x54CC, 0x54DD)
"""PixelCrop elements: top, bottom, left, right."""


class Element(NamedTuple):
    """An element: its kind, and where in the file its content begins and ends."""

    kind: int
    begin: int
    end: int


def cut_element(path: Path) -> str | None:
    """Why the last element of a file must be incomplete; None if nothing shows that."""
    at, size, cut = 0, os.path.getsize(path), False
    with path.open("rb") as file:
        while at < size:
            part = next(elements(file, at, size), None)
            if part is None or part.kind not in _KINDS:
                file.seek(at)
                rest = file.read(_LONGEST_HEAD)
                partial = len(rest) < _LONGEST_HEAD and any(kind.startswith(rest[: len(kind)]) for kind in _KIND_BYTES)
                cut = partial or ends_in_zeros(file, at, size)  # anything else is damage, which decoding reports
                break
            # Enter elements of unknown size, and the segment, whose size adds nothing to that of its last element.
            inside = part.kind == _SEGMENT or (part.kind == _CLUSTER and part.end == size)
            at = part.begin if inside else part.end
    return "its last cluster is incomplete" if cut or at > size else None


def pixel_crop(file: BinaryIO, size: int, stream: int) -> tuple[int, int, int, int]:
    """Stored pixels of a track that are not shown: at the top, the bottom, the left and the right."""
    segment = next((part for part in elements(file, 0, size) if part.kind == _SEGMENT), None)
    top = bottom = left = right = 0
    for part in elements(file, segment.begin, min(segment.end, size)) if segment is not None else ():
        if part.kind == _CLUSTER:
            break
        if part.kind == _TRACKS:
            tracks = [track for track in elements(file, *part[1:]) if track.kind == _TRACK]
            crop = dict.fromkeys(_PIXEL_CROP, 0)
            for video in elements(file, *tracks[stream][1:]) if stream < len(tracks) else ():
                if video.kind == _VIDEO:
                    for number in elements(file, *video[1:]):
                        if number.kind in crop:
                            file.seek(number.begin)
                            crop[number.kind] = int.from_bytes(file.read(min(8, number.end - number.begin)), "big")
            top, bottom, left, right = crop.values()
            break
    return top, bottom, left, right


def elements(file: BinaryIO, at: int, end: int) -> Iterator[Element]:
    """The elements between two positions in a file. The last may claim to end later."""
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
        at = end if length == (1 << bits) - 1 else begin + length  # all ones: the writer did not know the size
        yield Element(int.from_bytes(head[:id_size], "big"), begin, at)
