"""What kind of file some bytes begin: never what its name or its sender says."""

from __future__ import annotations

OTHER = "application/octet-stream"
_BEGINNINGS = (
    (b"\x1a\x45\xdf\xa3", "video/x-matroska"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
    (b"OggS", "video/ogg"),
    (b"FLV\x01", "video/x-flv"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "video/x-ms-asf"),
    (b"\x00\x00\x01\xba", "video/mpeg"),
    (b"\x00\x00\x01\xb3", "video/mpeg"),
)
HEAD = 512
"""Bytes that are enough to see it."""


def content_type(head: bytes) -> str:
    """The media type of a film or picture that begins with these bytes; `OTHER` for anything else."""
    if head[4:8] == b"ftyp":
        return {b"qt  ": "video/quicktime", b"avif": "image/avif", b"heic": "image/heic"}.get(head[8:12], "video/mp4")
    if head[:4] == b"RIFF":
        return {b"AVI ": "video/x-msvideo", b"WEBP": "image/webp"}.get(head[8:12], OTHER)
    if head[:4] == b"\x1a\x45\xdf\xa3" and b"webm" in head[:64]:
        return "video/webm"
    if head[:1] == b"G" and head[188:189] == b"G":
        return "video/mp2t"
    return next((kind for beginning, kind in _BEGINNINGS if head.startswith(beginning)), OTHER)
