"""`file:` URLs: films of the server's owner, in one folder."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tieredkv.errors import VideoError
from tieredkv.serve.errors import ApiError
from tieredkv.serve.media.identity import Identity, hashed, open_regular

_MOST_KNOWN = 10_000
"""Files whose hash is remembered."""


class Folder:
    """The folder below which `file:` URLs point; None: nowhere. Its methods block, on any thread."""

    def __init__(self, path: Path | None) -> None:
        self._root = None if path is None else Path(os.path.realpath(path))
        self._known: OrderedDict[Path, tuple[Identity, str]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, url: str) -> tuple[Path, str]:
        """The file that a URL names, and its name for messages: its path in the folder. Raises `ApiError`.

        A file outside is refused in the same words whether it exists or not.
        """
        if self._root is None:
            raise _refused("file: URLs are off: start the server with --videos and the folder of the films.")
        wanted = _path_of(url)
        real = Path(os.path.realpath(self._root / wanted))  # an absolute path takes the place of the root
        if not real.is_relative_to(self._root) or real == self._root:
            raise _refused("this file: URL does not point below the folder of --videos: give a film that is there.")
        name = real.relative_to(self._root)
        if any(part.startswith(".") for part in name.parts):
            raise _refused(f"{name}: hidden files are not read.")
        return real, str(name)

    def examine(self, path: Path, name: str, stop: threading.Event) -> tuple[str, Identity]:
        """Hash and identity of a file that `find` found. stop: set to end early. Raises `VideoError`."""
        descriptor = self._opened(path, name)
        try:
            identity = Identity.of(descriptor)
            with self._lock:
                known = self._known.get(path)
            if known is not None and known[0] == identity:
                return known[1], identity
            sha256, identity = hashed(descriptor, name, stop)
            with self._lock:
                self._known[path] = identity, sha256
                self._known.move_to_end(path)
                while len(self._known) > _MOST_KNOWN:
                    self._known.popitem(last=False)
            return sha256, identity
        finally:
            os.close(descriptor)

    def _opened(self, path: Path, name: str) -> int:
        """A descriptor of the file, reached from the folder without a symbolic link: one that took the place of a
        part of the path since `find` leads nowhere."""
        assert self._root is not None
        *folders, last = path.relative_to(self._root).parts
        try:
            here = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            for folder in folders:
                try:
                    inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
                finally:
                    os.close(here)
                here = inner
        except OSError:
            raise VideoError(f"{name}: no such file in the folder of --videos.") from None
        try:
            return open_regular(last, name, here)
        finally:
            os.close(here)


def _path_of(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        raise _refused("this is no file: URL.") from None
    if parts.netloc not in ("", "localhost"):
        raise _refused("a file: URL of another host is not read: write file:///path/of/film.mp4.")
    if parts.query or parts.fragment:
        raise _refused("a file: URL has ? or # in it: write them as %3F and %23.")
    path = unquote(parts.path)
    if not path or "\0" in path:
        raise _refused("this file: URL names no file: write file:///path/of/film.mp4.")
    return path


def _refused(message: str) -> ApiError:
    return ApiError(403, message, code="file_refused", param="url")
