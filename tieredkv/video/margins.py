"""Margins of the stored pictures that a container says are not shown."""

from __future__ import annotations

import math
import os
import struct
from fractions import Fraction
from pathlib import Path

from tieredkv.video.container import MATROSKA, MP4
from tieredkv.video.matroska import pixel_crop
from tieredkv.video.mp4 import clean_aperture

Margins = tuple[int, int, int, int]
"""Stored pixels that are not shown: at the top, the bottom, the left and the right."""
NO_MARGINS = (0, 0, 0, 0)


def margins(path: Path, kind: str, stream: int) -> Margins:
    """The margins of the stream with this index. kind: FFmpeg's name of the format."""
    try:
        with path.open("rb") as file:
            size = os.path.getsize(path)
            if kind == MATROSKA:
                return pixel_crop(file, size, stream)
            aperture = clean_aperture(file, size, stream) if kind == MP4 else None
            if aperture is not None:
                vertical = _sides(aperture.stored_height, aperture.height, aperture.down)
                return vertical + _sides(aperture.stored_width, aperture.width, aperture.right)
    except (OSError, ValueError, ZeroDivisionError, struct.error):  # damaged: pictures are shown as they are stored
        pass
    return NO_MARGINS


def _sides(stored: int, shown: Fraction, offset: Fraction) -> tuple[int, int]:
    """Whole pixels before and after the part that is shown, whose centre is moved by `offset`."""
    before = math.floor((stored - shown) / 2 + offset)
    after = stored - math.floor(shown) - before
    if min(before, after) < 0 or shown < 1:
        raise ValueError
    return before, after
