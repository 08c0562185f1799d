"""A video whose bytes are not in a file of the user's: copied to a private temporary file while it is needed."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO

from tieredkv.errors import VideoError

BLOCK = 2**20
"""Bytes copied at a time."""


class LocalFile(os.PathLike[str]):
    """The path of a file, with the name that messages and sessions use. A temporary one is removed by `close`.

    As a context manager it closes itself; one that is not closed is removed with the object, at the latest at exit.
    """

    def __init__(self, path: Path, name: str, remove: Callable[[], object] | None = None) -> None:
        self._path, self._name = path, name
        self._remove = remove

    def __fspath__(self) -> str:
        return str(self._path)

    def __str__(self) -> str:
        return self._name

    def close(self) -> None:
        """Remove the file if it is temporary. May be called twice."""
        if self._remove is not None:
            self._remove()

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    @contextmanager
    def writing(name: str, basename: str) -> Iterator[tuple[BinaryIO, LocalFile]]:
        """A new temporary file open for writing, in a folder that only this user can read.

        name: as above. basename: of the file. Raises `VideoError` if it cannot be written. Removed if the block fails.
        """
        try:
            folder = Path(tempfile.mkdtemp(prefix="tieredkv-"))
        except OSError as error:
            raise VideoError(
                f"{name}: there is no folder for a temporary copy ({error.strerror}): set TMPDIR."
            ) from None
        path = folder / (PurePosixPath(basename).name[-100:] or "video")
        local = LocalFile(path, name)
        local._remove = weakref.finalize(local, shutil.rmtree, folder, ignore_errors=True)
        try:
            with path.open("wb") as file:
                yield file, local
        except BaseException as error:
            local.close()
            if isinstance(error, OSError) and not isinstance(error, VideoError) and error.filename is None:
                raise VideoError(
                    f"{name}: the copy in {folder.parent} failed ({error.strerror}): set TMPDIR."
                ) from None
            raise


def is_file_object(video: Any) -> bool:
    """Whether this is an open file, or something that can be read like one."""
    return callable(getattr(video, "read", None)) and callable(getattr(video, "seek", None))


def check_file_object(video: Any) -> None:
    """Raise `VideoError` unless the file object is open, binary and can be read from its beginning."""
    try:
        if isinstance(video, io.TextIOBase) or isinstance(video.read(0), str):
            raise VideoError("the file given is open for text: open it in binary mode, 'rb'.")
        if not getattr(video, "seekable", lambda: True)():
            raise VideoError("the file given cannot be read twice (a pipe or a socket): save it, or give io.BytesIO.")
    except (OSError, ValueError) as error:
        raise VideoError(f"the file given cannot be read ({error}).") from None


def local_file(video: Any, check: Callable[[], None] | None = None) -> LocalFile:
    """The whole content of a file object, wherever it was read to: its own file if it has one, else a temporary copy.

    check: called for every block copied; may raise to stop. Where the object stands does not change. Raises
    `VideoError`.
    """
    check_file_object(video)
    name = getattr(video, "name", None)
    if isinstance(name, str):
        with suppress(OSError, ValueError):
            if os.path.samestat(os.fstat(video.fileno()), os.stat(name)):
                with suppress(AttributeError, OSError):
                    video.flush()
                return LocalFile(Path(name), name)
    try:
        position = video.tell()
        video.seek(0)
        with LocalFile.writing("the file given", "video") as (copy, local):
            while block := video.read(BLOCK):
                if check is not None:
                    check()
                copy.write(block)
            empty = copy.tell() == 0
        video.seek(position)
    except (OSError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"the file given cannot be read ({error}).") from None
    if empty:
        raise VideoError("the file given is empty.")
    return local
