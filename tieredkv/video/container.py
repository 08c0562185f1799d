"""Opens a video file at the stream that players show; errors for files that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tieredkv.errors import VideoError
from tieredkv.video import pyav as av

MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
MATROSKA = "matroska,webm"
"""FFmpeg's names of formats."""

_STILL_BRANDS = {"avif", "heic", "heix", "mif1"}
"""What MP4-like files of one picture call themselves; sequences have other brands."""
_DEFAULT_BONUS = 5_000_000
"""Pixels added to the size of a stream marked as default when streams are ranked, as in the `ffmpeg` program."""


@contextmanager
def opened(path: Path, index: int) -> Iterator[tuple[Any, Any]]:
    """The file's container and its stream `index`, closed at the end of the block. Raises `VideoError`."""
    with _container(path) as container:
        stream = container.streams[index]
        stream.thread_type = "AUTO"
        yield container, stream


def video_streams(path: Path) -> list[int]:
    """Indices of the file's video streams that can be decoded, in the order in which FFmpeg prefers them.

    The largest picture comes first. Cover pictures are left out. Raises `VideoError`.
    """
    with _container(path) as container:
        streams = [s for s in container.streams.video if av.stream.Disposition.attached_pic not in s.disposition]
        if not streams:
            raise VideoError(f"{path}: there is no video stream in this file.")
        decodable = [s for s in streams if s.codec_context is not None]
        if not decodable:
            raise VideoError(
                f"{path}: FFmpeg has no decoder for this file's video: re-encode it, as H.264 for example."
            )
        return [s.index for s in sorted(decodable, key=_rank, reverse=True)]


def tags(path: Path) -> dict[str, str]:
    """What the file says about itself (title, comment ...), by name in lower case. Raises `VideoError`."""
    with _container(path) as container:
        return {name.lower(): value for name, value in container.metadata.items()}


def is_still(container: Any) -> bool:
    """Whether the file is one picture, such as a PNG, a JPEG or a HEIC; FFmpeg has another format for animated PNGs."""
    kind, brand = container.format.name, container.metadata.get("major_brand")
    return kind == "image2" or kind.endswith("_pipe") or (kind == MP4 and brand in _STILL_BRANDS)


def _rank(stream: Any) -> int:
    default = av.stream.Disposition.default in stream.disposition
    return int(stream.codec_context.width * stream.codec_context.height + _DEFAULT_BONUS * default)


@contextmanager
def _container(path: Path) -> Iterator[Any]:
    try:
        # Absolute: in a bare name FFmpeg would take the part before a colon for a protocol.
        container = av.open(str(path.absolute()), metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        raise unreadable(path, error) from None
    with container:
        yield container


def decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Frames from the current position. Raises `av.FFmpegError` or `OSError` where decoding fails."""
    try:
        yield from container.decode(stream)
    except IndexError:
        # After the last packet PyAV flushes the decoders, and finds a stream that appeared in the middle of the file.
        flush = av.Packet()
        flush.stream, flush.time_base = stream, stream.time_base
        yield from stream.decode(flush)


def unreadable(path: Path, error: Exception) -> VideoError:
    return VideoError(f"{path}: not a readable video file ({reason(error)}).")


def cut_short(path: Path, time: float, why: str) -> VideoError:
    return VideoError(
        f"{path}: decoding stopped at {time:.2f} s ({why}): the file is damaged or cut short. "
        "Get the whole file, or go over what is damaged with skip_damaged (--skip-damaged)."
    )


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
