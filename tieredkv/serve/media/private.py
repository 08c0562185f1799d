"""A private folder for temporary films, which no server that was killed leaves behind for good."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_PREFIX = "tieredkv-films-"
_LOCK = "lock"
_UNLOCKED_S = 3600.0
"""Seconds after which a folder without a lock counts as left behind; one is made a moment after the other."""


class PrivateFolder:
    """A folder that only this user can read, from its construction until `close`. The system releases the lock in it
    when the process is killed; the next one to be constructed then removes it."""

    def __init__(self) -> None:
        """Raises `OSError` if there is no place for it."""
        _remove_leftovers()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._descriptor: int | None = os.open(
            self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """Remove it with all in it. May be called twice."""
        if self._descriptor is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._descriptor)
            self._descriptor = None


def _remove_leftovers() -> None:
    with suppress(OSError):
        for entry in os.scandir(tempfile.gettempdir()):
            if entry.name.startswith(_PREFIX) and _left_behind(entry):
                shutil.rmtree(entry.path, ignore_errors=True)


def _left_behind(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder of this user that no process works in."""
    try:
        found = entry.stat(follow_symlinks=False)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return False
        descriptor = os.open(os.path.join(entry.path, _LOCK), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return time.time() - found.st_mtime > _UNLOCKED_S
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
