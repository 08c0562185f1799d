"""A folder that one process at a time works in, and that disappears when the work is done.

Imports nothing heavy: whether a folder is in use can be asked before anything is loaded.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from tieredkv.errors import SessionError
from tieredkv.storage.atomic import sync_folder
from tieredkv.storage.header import check_target

_LOCK = "lock"


class LockedFolder:
    """The folder at `path`, created if it does not exist. Locked until `close`, also against other threads.

    The system releases the lock of a process that was killed.
    """

    def __init__(self, path: Path, files: Iterable[str]) -> None:
        """files: names of what is kept there. Raises `SessionError` if another holds the lock, the folder has anything
        else in it, which `remove` would remove too, or there can be no such folder."""
        self.path = path
        self._descriptor: int | None = None
        if not path.is_dir():
            check_target(path)
        try:
            if stranger := self._stranger((_LOCK, *files)):
                raise SessionError(f"{path} has {stranger} in it, so it is not overwritten: give a folder that is new.")
            while not self._lock():
                pass
        except BlockingIOError:
            raise SessionError(
                f"{path} is in use by another process: wait until it ends, or give another file."
            ) from None
        except OSError as error:
            raise SessionError(f"{path} could not be written: {error.strerror or error}.") from None

    def _stranger(self, own: Iterable[str]) -> str | None:
        """Something in the folder that is none of these files, nor what `atomic` leaves of one; None: there is none."""
        known = re.compile(rf"({'|'.join(map(re.escape, own))})(\.[\d-]+\.part)?")
        names = (entry.name for entry in self.path.iterdir()) if self.path.is_dir() else ()
        return next((name for name in names if not known.fullmatch(name)), None)

    def _lock(self) -> bool:
        """Whether the lock is that of the folder now at `path`; a process that ended may have removed another."""
        self.path.mkdir(exist_ok=True)
        name = self.path / _LOCK
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(name)):
                self._descriptor, descriptor = descriptor, -1
        except FileNotFoundError:
            pass
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return self._descriptor is not None

    @property
    def locked(self) -> bool:
        """Whether it has not been closed."""
        return self._descriptor is not None

    def is_empty(self) -> bool:
        """Whether nothing has been written into it."""
        return {entry.name for entry in self.path.iterdir()} <= {_LOCK}

    def remove(self) -> None:
        """Remove the folder with all in it, and close. Does nothing if it was closed before."""
        if self._descriptor is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            sync_folder(self.path.parent)
        self.close()

    def close(self) -> None:
        """Release the lock. May be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
