"""What a prompt can show: one video, or several videos and still pictures in the order given."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tieredkv.errors import OptionError, VideoError, first_line
from tieredkv.video.paths import check_path
from tieredkv.video.sampling import Sampling, Tick
from tieredkv.video.subtitles import AUTO, Cue
from tieredkv.video.urls import check_url, is_url

if TYPE_CHECKING:
    from PIL.Image import Image

    from tieredkv.video.frames import VideoSource

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""How the names of files end that are still pictures in a list of several."""
_OPTIONS = {field.name for field in fields(Sampling)} - {"fit"}


class Video:
    """A video, with what of its sampling differs from the session's: any of `open_session`'s options of that kind."""

    kind: Literal["video"] = "video"

    def __init__(self, source: Any, **options: Any) -> None:
        """source: as in `tieredkv.open_session`. Raises `OptionError` or `VideoError` for options that no video has."""
        if unknown := sorted(options.keys() - _OPTIONS):
            raise OptionError(f"{unknown[0]!r} is not an option of a video: give one of {', '.join(sorted(_OPTIONS))}.")
        Sampling(**options)
        self.source, self.options = source, options

    def __repr__(self) -> str:
        return f"Video({self.source!r}{''.join(f', {name}={value!r}' for name, value in self.options.items())})"

    def check(self) -> None:
        """Raise `VideoError` unless the source is frames or a file; nothing is read."""
        from tieredkv.video.frames import check_video  # imports torch

        check_video(self.source)

    def open(self, sampling: Sampling, check: Callable[[], None] | None = None) -> VideoSource:
        """See `tieredkv.video.frames.open_video`. sampling: the session's."""
        from tieredkv.video.frames import open_video

        return open_video(self.source, self.sampling(sampling), check)

    def sampling(self, sampling: Sampling) -> Sampling:
        """How it is sampled. sampling: the session's."""
        return replace(sampling, **self.options)


class Picture:
    """A still picture."""

    kind: Literal["image"] = "image"

    def __init__(self, source: Any) -> None:
        """source: a path, or a PIL image."""
        self.source = source

    def __repr__(self) -> str:
        return f"Picture({self.source!r})"

    def check(self) -> None:
        """Raise `VideoError` unless the source is a PIL image or a file; nothing is read."""
        if isinstance(self.source, str | os.PathLike):
            check_path(self.source)
        elif not _is_image(self.source):
            raise VideoError(f"a picture is of type {type(self.source).__name__}: give a path or a PIL image.")

    def open(self, sampling: Sampling, check: Callable[[], None] | None = None) -> VideoSource:
        """A source of one frame. Raises `VideoError` if there is no picture."""
        self.check()
        return _PictureSource(self.source)

    def sampling(self, sampling: Sampling) -> Sampling:
        """`sampling`, of which only `max_pixels` applies."""
        return sampling


Medium = Video | Picture


def media_of(video: Any) -> tuple[Medium, ...]:
    """What `video` names: one video, or if it is a list or tuple with a path, a `Video` or a `Picture` in it, several
    media. In such a list, files called as pictures are, and PIL images, are still pictures."""
    if isinstance(video, Video | Picture):
        return (video,)
    if isinstance(video, list | tuple) and any(isinstance(one, str | os.PathLike | Video | Picture) for one in video):
        return tuple(map(_medium, video))
    return (Video(video),)


def check_media(video: Any, allow_url: bool = False) -> tuple[Medium, ...]:
    """The same. Raises `VideoError` for anything that is no video or picture; nothing is read.

    allow_url: a URL may be one, of which `fetched` makes a file.
    """
    media = media_of(video)
    for medium in media:
        if is_url(medium.source):
            check_url(medium.source, allow_url)
        else:
            medium.check()
    return media


def check_subtitles(media: Sequence[Medium], sampling: Sampling) -> None:
    """Raise `OptionError` if one subtitle file would be written between the frames of several videos.

    sampling: the session's.
    """
    if sampling.subtitles in (None, AUTO):
        return
    count = sum(isinstance(medium, Video) and "subtitles" not in medium.options for medium in media)
    if count > 1:
        raise OptionError(
            f"subtitles={sampling.subtitles!r} is one file for {count} videos: give {AUTO!r}, or in Python each its "
            "own, as in Video('a.mp4', subtitles='a.srt')."
        )


def _medium(one: Any) -> Medium:
    if isinstance(one, Video | Picture):
        return one
    still = Path(one).suffix.lower() in PICTURES if isinstance(one, str | os.PathLike) else _is_image(one)
    return Picture(one) if still else Video(one)


def _is_image(source: Any) -> bool:
    from PIL import Image

    return isinstance(source, Image.Image)


class _PictureSource:
    """A `VideoSource` of one frame, which is read anew each time."""

    fps, start, expected = 1.0, 0.0, 1
    seconds: float | None = 0.0
    cues: tuple[Cue, ...] = ()
    damaged: tuple[tuple[float, float], ...] = ()

    def __init__(self, source: Any) -> None:
        self._source = source
        self.name = str(source) if isinstance(source, str | os.PathLike) else "the picture given"
        self.width, self.height = self._read().size

    def _read(self) -> Image:
        """As it is shown: turned as its EXIF data say."""
        from PIL import Image, ImageOps

        try:
            if not isinstance(self._source, str | os.PathLike):
                return ImageOps.exif_transpose(self._source).convert("RGB")
            with Image.open(self._source) as picture:
                return ImageOps.exif_transpose(picture).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise VideoError(f"{self.name}: not a readable picture ({first_line(error)}).") from None

    def frames(self, tick: Tick | None = None, first: int = 0) -> Iterator[np.ndarray]:
        """The picture."""
        if tick is not None:
            tick(0.0)
        if not first:
            yield np.asarray(self._read())

    def sha256(self, check: Callable[[], None] | None = None) -> str:
        """Hash of the file's bytes, or of the pixels of a PIL image and their shape."""
        if isinstance(self._source, str | os.PathLike):
            try:
                return hashlib.sha256(Path(self._source).read_bytes()).hexdigest()
            except OSError as error:
                raise VideoError(f"{self.name}: cannot be read ({error.strerror or error}).") from None
        pixels = np.asarray(self._read())
        return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
