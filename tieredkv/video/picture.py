"""Decoded frames as RGB pictures with square pixels, cropped and rotated as FFmpeg and players show them."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tieredkv.errors import VideoError
from tieredkv.video import pyav as av
from tieredkv.video.margins import Margins, margins

_SQUARE = Fraction(1)
_ROUNDING = 0.005
"""Pixels at most this far from square come from a rounded display size, and are not resampled."""
_LONGEST = 10
"""A larger ratio of a pixel's sides is a damaged number: pixels then count as square."""
_UNSPECIFIED, _RESERVED = 2, 3
"""FFmpeg's values of a colour property, the same for matrix, transfer and primaries."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the pictures of a stream are shown, as far as the container states it."""

    aspect: Fraction
    """Width of a stored pixel divided by its height."""
    crop: Margins

    @staticmethod
    def of(path: Path, container: Any, stream: Any) -> Geometry:
        """The geometry of an open file's stream."""
        aspect = stream.sample_aspect_ratio  # the container's, otherwise the codec's
        return Geometry(_usable(aspect), margins(path, container.format.name, stream.index))


class Painter:
    """Converts decoded frames to arrays."""

    def __init__(self, path: Path, geometry: Geometry) -> None:
        self._path, self._geometry = path, geometry
        # One for all frames: the state of a scaler takes megabytes.
        self._reformatter = av.video.reformatter.VideoReformatter()

    def paint(self, frame: Any) -> np.ndarray:
        """The picture that `frame` shows, uint8 `(H, W, 3)`.

        Colours follow the matrix and the range that the frame states; without a matrix BT.601, as in FFmpeg. Raises
        `VideoError` for a matrix that FFmpeg cannot convert, and PyAV's errors for a broken frame.
        """
        top, bottom, left, right = self._geometry.crop
        width = round(frame.width * self._geometry.aspect)  # resamples columns only, so that no row is lost
        picture = self._rgb(frame, max(1, width))
        scale = picture.shape[1] / frame.width
        columns = slice(round(left * scale), picture.shape[1] - round(right * scale))
        picture = picture[top : frame.height - bottom, columns]
        if 0 in picture.shape:
            raise VideoError(f"{self._path}: the margins that the file states leave nothing of its pictures: crop it.")
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is not None:
            picture = rotated(picture, struct.unpack("=9i", bytes(matrix)[:36]))
        return np.ascontiguousarray(picture)

    def _rgb(self, frame: Any, width: int) -> np.ndarray:
        for name in ("colorspace", "color_trc", "color_primaries"):
            if getattr(frame, name) == _RESERVED:  # FFmpeg's scaler refuses it, although it means the same
                setattr(frame, name, _UNSPECIFIED)
        method = None if width == frame.width else av.video.reformatter.Interpolation.BICUBIC
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


def rotated(picture: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """`picture` mirrored and rotated by a display matrix, as in the `ffmpeg` program.

    matrix: nine numbers, row by row. An angle that is not a multiple of 90 degrees keeps the size, with black corners.
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


def _usable(aspect: Fraction | None) -> Fraction:
    if aspect is None or abs(aspect - 1) < _ROUNDING or not 1 / _LONGEST <= aspect <= _LONGEST:
        return _SQUARE
    return Fraction(aspect)
