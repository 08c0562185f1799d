"""Videos and pictures as files: themselves, or what their URLs are downloaded to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

from tieredkv.video.media import Picture, Video
from tieredkv.video.urls import check_url, is_url


@contextmanager
def fetched(video: Any, allow_url: bool, progress: bool = False) -> Iterator[Any]:
    """`video`, with the files that its URLs, which must be allowed, were downloaded to, removed afterwards.

    video: as in `media_of`. progress: show a bar on stderr. Raises `VideoError`.
    """
    with ExitStack() as files:

        def local(one: Any) -> Any:
            if isinstance(one, Video | Picture) and is_url(one.source):
                one = copy(one)
                one.source = local(one.source)
            elif is_url(one):
                check_url(one, allow_url)
                from tieredkv.video.download import download  # not for files: it imports much

                one = files.enter_context(download(one, progress))
            return one

        yield [local(one) for one in video] if isinstance(video, list | tuple) else local(video)
