"""Decoded frames as pictures: in RGB, with square pixels, cropped and turned as FFmpeg and players show them."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from tieredkv.errors import VideoError
from tieredkv.video.structure import Margins, margins

_SQUARE = Fraction(1)
_ROUNDING = 0.005
"""Pixels this little off square come from a display size that was rounded, and are not worth resampling."""
_LONGEST = 10
"""Sides of a pixel further apart than this are a damaged number: pixels are then square."""
_UNSPECIFIED, _RESERVED = 2, 3
"""Of FFmpeg's colour properties, the same for matrix, transfer and primaries."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the pictures of a stream are shown, besides what each frame says of itself."""

    aspect: Fraction
    """Width of a stored pixel by its height."""
    crop: Margins

    @staticmethod
    def of(path: Path, container: Any, stream: Any) -> Geometry:
        """That of an open file's stream."""
        aspect = stream.sample_aspect_ratio  # the container's, or else the codec's
        return Geometry(_shape(aspect), margins(path, container.format.name, stream.index))


class Painter:
    """Makes arrays of decoded frames."""

    def __init__(self, path: Path, geometry: Geometry) -> None:
        self._path, self._geometry = path, geometry
        # One for all: the state of a scaler is megabytes, and each frame would have its own.
        self._reformatter = VideoReformatter()

    def paint(self, frame: Any) -> np.ndarray:
        """The picture that `frame` shows, uint8 `(H, W, 3)`.

        Colours go by the matrix and the range that the frame states; without a matrix by BT.601, as in FFmpeg. Raises
        `VideoError` for a matrix that FFmpeg does not convert, and what PyAV raises for a broken frame.
        """
        top, bottom, left, right = self._geometry.crop
        width = round(frame.width * self._geometry.aspect)  # no row is lost, whichever side of a pixel is longer
        picture = self._rgb(frame, max(1, width))
        scale = picture.shape[1] / frame.width
        columns = slice(round(left * scale), picture.shape[1] - round(right * scale))
        picture = picture[top : frame.height - bottom, columns]
        if 0 in picture.shape:
            raise VideoError(f"{self._path}: nothing is left of its pictures by the margins the file states: crop it.")
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is not None:
            picture = turned(picture, struct.unpack("=9i", bytes(matrix)[:36]))
        return np.ascontiguousarray(picture)

    def _rgb(self, frame: Any, width: int) -> np.ndarray:
        for name in ("colorspace", "color_trc", "color_primaries"):
            if getattr(frame, name) == _RESERVED:  # FFmpeg's scaler refuses what says as little as "unspecified"
                setattr(frame, name, _UNSPECIFIED)
        method = None if width == frame.width else Interpolation.BICUBIC
        try:
            rgb = self._reformatter.reformat(frame, width=width, format="rgb24", interpolation=method)
        except (av.FFmpegError, OSError):
            if frame.colorspace in (_UNSPECIFIED, _RESERVED):
                raise
            raise VideoError(
                f"{self._path}: FFmpeg cannot convert its colours (matrix {int(frame.colorspace)}): "
                "re-encode the file as BT.709, for example."
            ) from None
        return rgb.to_ndarray()


def turned(picture: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """`picture` mirrored and turned by a display matrix, as the `ffmpeg` program does it.

    matrix: nine numbers by rows. An angle that is no quarter turn leaves the size as it is, and the corners black.
    """
    across, down = math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4])
    if not (across and down):
        return picture
    degrees = round(math.degrees(math.atan2(matrix[1] / down, matrix[0] / across))) % 360  # clockwise
    if abs(degrees - 90) <= 1:
        return picture.transpose(1, 0, 2) if matrix[3] > 0 else np.rot90(picture, -1)
    if abs(degrees - 180) <= 1:
        picture = picture[:, ::-1] if matrix[0] < 0 else picture
        return picture[::-1] if matrix[4] < 0 else picture
    if abs(degrees - 270) <= 1:
        return np.rot90(picture, -1)[::-1] if matrix[3] < 0 else np.rot90(picture)
    if 1 < degrees < 359:
        return np.asarray(Image.fromarray(picture).rotate(-degrees, Image.Resampling.BILINEAR))
    return picture[::-1] if matrix[4] < 0 else picture


def _shape(aspect: Fraction | None) -> Fraction:
    if aspect is None or abs(aspect - 1) < _ROUNDING or not 1 / _LONGEST <= aspect <= _LONGEST:
        return _SQUARE
    return Fraction(aspect)
