"""What a film of a stranger may cost."""

from __future__ import annotations

from dataclasses import dataclass

FORMATS = (
    "apng",
    "asf",
    "av1",
    "avi",
    "dv",
    "flv",
    "gif",
    "gxf",
    "h264",
    "hevc",
    "ivf",
    "m4v",
    "matroska",
    "mjpeg",
    "mov",
    "mpeg",
    "mpegts",
    "mpegvideo",
    "mxf",
    "nsv",
    "nut",
    "obu",
    "ogg",
    "rm",
    "vc1",
    "vvc",
    "webm",
    "wtv",
    "yuv4mpegpipe",
)
"""FFmpeg's names of the containers that are read. None of them opens another file."""
PICTURES = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Pillow's names of the pictures that are read."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one film, while it is decoded."""

    pixels: int = 36_000_000
    """Of one picture; 8192 x 4320 is 35.4 million."""
    seconds: float = 12 * 3600.0
    """Length, as far as it is sampled."""
    frames: int = 1_000_000
    """That are taken."""
    decoded: int = 12_000_000
    """That are decoded to get those: 12 hours at 240 a second are 10.4 million."""
    streams: int = 64
    memory: int = 4 * 2**30
    """Bytes of address space of the process that decodes."""
    processor_s: int = 6 * 3600
    """Seconds of processor time."""
    patience_s: float = 30.0
    """Seconds without a sign of progress after which that process is killed."""
    cues: int = 2**24
    """Bytes of its subtitles."""
