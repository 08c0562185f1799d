"""Temporary files that no kill leaves behind: nameless where the system can, cleared at the next start elsewhere."""

from __future__ import annotations

import itertools
import os
import re
from contextlib import suppress
from pathlib import Path

import psutil

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

NAME = re.compile(r"tieredkv-(\d{1,9})-\d+\.records")
"""Of a file that could not lose its name yet: the process that created it, and a number."""
_numbers = itertools.count()


class TemporaryFile:
    """An empty file in `folder`, open for reading and writing; freed with the object, and by the end of the process.

    Where a file can be open without a name it has none. Elsewhere it is removed by `close`, or when the next file is
    created in the folder after the process has ended: a lock, which the system releases, says that it has not.
    """

    def __init__(self, folder: Path) -> None:
        """Raises `OSError` if the folder cannot have it."""
        remove_leftovers(folder)
        self._process, self._name = os.getpid(), None
        self.descriptor = _nameless(folder)
        if self.descriptor < 0:
            self.descriptor, self._name = _named(folder)

    def close(self) -> None:
        """Free the disk. May be called twice."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
            if self._name is not None and self._process == os.getpid():
                self._name.unlink(missing_ok=True)

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):
            self.close()


def remove_leftovers(folder: Path) -> None:
    """Remove the files of processes that have ended."""
    for path in folder.iterdir():
        match = NAME.fullmatch(path.name)
        if match is not None and not _in_use(path, int(match[1])):
            with suppress(OSError):
                path.unlink()


def _in_use(path: Path, process: int) -> bool:
    if fcntl is None:
        return psutil.pid_exists(process)
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:  # removed since, or another user's
        return True
    try:
        return not _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether the lock could be taken."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _nameless(folder: Path) -> int:
    """A descriptor of a file that never has a name; -1 if the system has none."""
    if hasattr(os, "O_TMPFILE"):
        with suppress(OSError):  # not on every file system
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600)
    return -1


def _named(folder: Path) -> tuple[int, Path | None]:
    """A descriptor of a new file, and its name if it could not be removed at once."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        path = folder / f"tieredkv-{os.getpid()}-{next(_numbers)}.records"
        try:
            descriptor = os.open(path, flags, 0o600)
        except FileExistsError:  # of an earlier process with our number, in another container
            continue
        if not _lock(descriptor):  # another process is about to remove it, before it was locked
            os.close(descriptor)
            continue
        try:
            path.unlink()
        except OSError:
            return descriptor, path
        return descriptor, None
