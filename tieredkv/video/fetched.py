"""A video as a file: itself, or what its URL is downloaded to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tieredkv.video.urls import check_url, is_url


@contextmanager
def fetched(video: Any, allow_url: bool, progress: bool = False) -> Iterator[Any]:
    """`video`, or if it is a URL, which must be allowed, the file that it was downloaded to, removed afterwards.

    progress: show a bar on stderr. Raises `VideoError`.
    """
    if not is_url(video):
        yield video
        return
    check_url(video, allow_url)
    from tieredkv.video.download import download  # not for files: it imports much

    with download(video, progress) as local:
        yield local
