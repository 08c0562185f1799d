"""Single pictures of films as JPEG, decoded in another process and kept while there is room."""

from __future__ import annotations

import asyncio
import io
import threading
from collections import OrderedDict
from contextlib import closing

from PIL import Image

from tieredkv.errors import VideoError
from tieredkv.serve.asked import Film, Shown
from tieredkv.serve.media.library import Library
from tieredkv.serve.media.threads import stoppable
from tieredkv.video.sampling import Sampling

WIDEST = 1920
_AT_ONCE = 2
"""Films that are decoded at the same time."""
_KEPT = 2**25
"""Bytes of pictures that are kept."""
_QUALITY = 82


class Thumbnails:
    """Of the films of one library. On the event loop."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._kept: OrderedDict[tuple[str, float, int], bytes] = OrderedDict()
        self._bytes = 0

    async def jpeg(self, film: Film, time: float, width: int) -> bytes:
        """The picture shown at `time`, in seconds, at most `width` wide. Raises `VideoError`."""
        key = film.sha256, round(time, 3), width
        async with self._places:
            if (picture := self._kept.get(key)) is None:
                stop = threading.Event()
                picture = await stoppable(stop, lambda: self._made(film, time, width, stop))
                self._kept[key] = picture
                self._bytes += len(picture)
                while self._bytes > _KEPT:
                    self._bytes -= len(self._kept.popitem(last=False)[1])
            self._kept.move_to_end(key)
            return picture

    def _made(self, film: Film, time: float, width: int, stop: threading.Event) -> bytes:
        def check() -> None:
            if stop.is_set():
                raise VideoError(f"{film.name}: the request was cancelled.")

        shown = Shown(film, Sampling(fps=1.0, max_frames=1, start=time))
        source = self._library.source(shown).open(Sampling(fps=1.0), check)
        with closing(source.frames(lambda seconds: check())) as frames:  # type: ignore[type-var]
            pixels = next(iter(frames), None)
        if pixels is None:
            raise VideoError(f"{film.name}: there is no picture at {time:g} s.")
        picture = Image.fromarray(pixels)
        if picture.width > width:
            picture = picture.resize((width, max(1, round(picture.height * width / picture.width))))
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=_QUALITY)
        return out.getvalue()
