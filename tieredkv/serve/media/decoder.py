"""The process that decodes: `python -m tieredkv.serve.media.decoder`, started by `guarded`. Imports no torch.

Everything that parses a stranger's bytes runs here, under `confine`. It reads requests from stdin, writes to stdout
what `wire` says, and ends when stdin does.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from tieredkv.errors import VideoError, first_line
from tieredkv.serve.media import wire
from tieredkv.serve.media.confine import confine
from tieredkv.serve.media.limits import FORMATS, PICTURES, Limits
from tieredkv.video import pyav as av
from tieredkv.video.local_file import LocalFile
from tieredkv.video.media import Picture
from tieredkv.video.playlists import names_others
from tieredkv.video.sampling import FileSource, Sampling
from tieredkv.video.subtitles import read_cues

_BEAT_S = 0.1
"""Seconds between two signs of life."""
_HEAD = 512
"""Bytes that show a playlist."""


def main() -> None:
    """Answer the request on stdin."""
    out = Messages(os.dup(1))
    os.dup2(2, 1)  # nothing else may write between the messages
    request = json.loads(sys.stdin.buffer.readline())
    limits = Limits(**request["limits"])
    if request["kind"] == "image":
        Image.init()  # the libraries of its formats can no longer be loaded afterwards
    confine(limits, request["descriptor"])
    try:
        source = _opened(request, limits, out)
        out.facts(source)
        for line in sys.stdin.buffer:
            _send_frames(source, int(line), limits, out)
    except VideoError as error:
        out.send(wire.FAILED, str(error).encode("utf-8", "replace"))
    except MemoryError:
        out.send(wire.FAILED, f"{request['name']}: decoding it takes too much memory: make it smaller.".encode())
    except Exception as error:  # noqa: BLE001  whatever a damaged file brings about is one sentence
        text = f"{request['name']}: not a readable {request['kind']} ({first_line(error)})."
        out.send(wire.FAILED, text.encode("utf-8", "replace"))


class Messages:
    """Writes messages to a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._beat = descriptor, 0.0

    def send(self, kind: bytes, *parts: Any) -> None:
        """One message of these bytes."""
        views = [memoryview(part).cast("B") for part in parts]
        views.insert(0, memoryview(wire.HEAD.pack(kind, sum(map(len, views)))))
        for view in views:
            while view:
                view = view[os.write(self._descriptor, view) :]

    def beat(self, seconds: float = 0.0) -> None:
        """A sign of life, now and then."""
        if (now := time.monotonic()) > self._beat + _BEAT_S:
            self._beat = now
            self.send(wire.TICK, wire.SECONDS.pack(seconds))

    def facts(self, source: Any) -> None:
        """What is known of an open film."""
        names = ("height", "width", "fps", "start", "expected", "seconds", "cues")
        self.send(wire.FACTS, json.dumps({name: getattr(source, name) for name in names}).encode())


def _opened(request: dict[str, Any], limits: Limits, out: Messages) -> Any:
    path, name = Path(request["path"]), request["name"]
    with path.open("rb") as file:
        if names_others(file.read(_HEAD)):
            raise VideoError(f"{name}: not a video file but a web page or a playlist: give the file itself.")
    source: Any
    if request["kind"] == "image":
        _check_picture(path, name, limits)
        source = Picture(LocalFile(path, name)).open(Sampling())
    else:
        av.restrict(FORMATS, limits.streams)
        _check_video(path, name, limits)
        sampling = Sampling(**request["sampling"])
        source = FileSource(LocalFile(path, name), sampling, out.beat)
        if sampling.subtitles is not None:
            source.cues = tuple(read_cues(sampling.subtitles, LocalFile(path, name)))
    _check_size(name, source.width, source.height, limits)
    if source.expected > limits.frames:
        raise VideoError(f"{name}: {source.expected:,} frames, where {limits.frames:,} may be taken: lower fps.")
    if source.seconds is not None and source.start + source.seconds > limits.seconds:
        raise VideoError(_too_long(name, source.start + source.seconds, limits))
    if sum(len(cue.text) + 100 for cue in source.cues) > limits.cues:
        raise VideoError(f"{name}: its subtitles are too long: leave them out.")
    return source


def _check_video(path: Path, name: str, limits: Limits) -> None:
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if len(container.streams) >= limits.streams:
                raise VideoError(f"{name}: at least {limits.streams} streams: keep its picture and its sound.")
            for stream in container.streams.video:
                if stream.codec_context is not None:
                    _check_size(name, stream.codec_context.width, stream.codec_context.height, limits)
    except (av.FFmpegError, OSError) as error:
        if error.errno == errno.ENOMEM:
            raise VideoError(
                f"{name}: it has more than {limits.streams} streams or takes too much memory: keep its picture and its "
                "sound only."
            ) from None
        raise VideoError(f"{name}: not a readable video file ({getattr(error, 'strerror', None) or error}).") from None


def _check_picture(path: Path, name: str, limits: Limits) -> None:
    try:
        with Image.open(path, formats=PICTURES) as picture:
            _check_size(name, *picture.size, limits)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise VideoError(f"{name}: more than the {limits.pixels:,} pixels that a picture may have.") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"{name}: not a readable picture: give a JPEG, PNG, WebP, TIFF, GIF or BMP file.") from None


def _check_size(name: str, width: int, height: int, limits: Limits) -> None:
    if width * height > limits.pixels:
        raise VideoError(
            f"{name}: pictures of {width}x{height}, more than the {limits.pixels:,} pixels that one may have: make it "
            "smaller."
        )


def _too_long(name: str, seconds: float, limits: Limits) -> str:
    return f"{name}: {seconds / 3600:.1f} hours, longer than the {limits.seconds / 3600:g} that are read: give an end."


def _send_frames(source: Any, first: int, limits: Limits, out: Messages) -> None:
    decoded = 0

    def tick(seconds: float) -> None:
        nonlocal decoded
        decoded += 1
        if source.start + seconds > limits.seconds + 1:
            raise VideoError(_too_long(source.name, source.start + seconds, limits))
        if decoded > limits.decoded:
            raise VideoError(f"{source.name}: more than {limits.decoded:,} frames: give an end.")
        out.beat(seconds)

    last = None
    for number, picture in enumerate(source.frames(tick, first)):
        if first + number >= limits.frames:
            raise VideoError(f"{source.name}: more than {limits.frames:,} frames: lower fps.")
        if picture is last:
            out.send(wire.SAME)
        else:
            out.send(wire.FRAME, picture)
        last = picture
    out.send(wire.END, json.dumps(source.damaged).encode())


if __name__ == "__main__":
    main()
