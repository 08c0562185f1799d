"""Whether a path can be a video file, before anything is imported that could read one."""

from __future__ import annotations

import os
from pathlib import Path

from tieredkv.errors import VideoError
from tieredkv.video.urls import check_url, is_url


def check_path(video: str | os.PathLike[str]) -> None:
    """Raise `VideoError` unless this is the path of a regular file that may be read and is not empty."""
    if is_url(video):
        check_url(str(video), allowed=False)
    try:
        path = Path(video)
        exists, folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:
        raise VideoError(f"{str(video)[:80]}: no such file ({error.__class__.__name__}).") from None
    if not exists and str(video) == "-":
        raise VideoError("- (stdin) cannot be a video, which is read more than once: save it as a file.")
    if not exists:
        raise VideoError(f"{video}: no such file.")
    if folder:
        raise VideoError(f"{str(video) or repr(str(video))} is a folder, not a video file.")
    if not path.is_file():  # reading a pipe might never end
        raise VideoError(f"{video} is not a regular file: save the video as one.")
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise VideoError(f"{video}: cannot be read ({error.strerror or error}).") from None
    if empty:
        raise VideoError(f"{video}: not a readable video file (it is empty).")
