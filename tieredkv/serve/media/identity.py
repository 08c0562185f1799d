"""Whether a file is still the one whose bytes were hashed."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from pathlib import Path
from typing import NamedTuple

from tieredkv.errors import VideoError

_BLOCK = 2**20


class Identity(NamedTuple):
    """What changes when a file is replaced or written to."""

    device: int
    inode: int
    size: int
    changed: int
    """Nanoseconds; not to be set at will, unlike the time of modification."""
    modified: int

    @staticmethod
    def of(descriptor: int) -> Identity:
        """Of an open file."""
        found = os.fstat(descriptor)
        return Identity(found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns, found.st_mtime_ns)


def open_regular(path: str | Path, name: str, folder: int | None = None) -> int:
    """A descriptor of a regular file, which is no symbolic link; the caller closes it. Raises `VideoError`.

    name: for messages. folder: a descriptor of the folder that a relative `path` is in.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for somebody who writes.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except (OSError, ValueError):
        raise VideoError(f"{name}: no such file, or it cannot be read.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise VideoError(f"{name} is not a regular file: give a film.")
    return descriptor


def open_known(path: Path, name: str, identity: Identity) -> int:
    """The same, if it is the file with this identity."""
    descriptor = open_regular(path, name)
    if Identity.of(descriptor) != identity:
        os.close(descriptor)
        raise changed(name)
    return descriptor


def changed(name: str) -> VideoError:
    """The error for a file that is not the same any more."""
    return VideoError(f"{name}: the file has changed since it was first read: ask again.")


def hashed(descriptor: int, name: str, stop: threading.Event) -> tuple[str, Identity]:
    """SHA-256 of an open file, and its identity. stop: set to end early. Raises `VideoError` if it changes."""
    before, digest, at = Identity.of(descriptor), hashlib.sha256(), 0
    while block := os.pread(descriptor, _BLOCK, at):
        digest.update(block)
        at += len(block)
        if stop.is_set():
            raise VideoError(f"{name}: the request was cancelled.")
    if Identity.of(descriptor) != before:
        raise changed(name)
    return digest.hexdigest(), before
