"""Sessions on disk: a folder of session files under a cap, which several servers may share."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tieredkv.errors import SessionError
from tieredkv.session.beside import checkpoint_path, locked, remove_leftover
from tieredkv.session.conversation_file import SUFFIX
from tieredkv.storage.header import check_target

DIGITS = 32
"""Of a key, in the name of a file."""
_OURS = re.compile(rf".*-[0-9a-f]{{{DIGITS}}}\.tkv")
_CHECKPOINT = re.compile(rf"{_OURS.pattern}\.checkpoint")


class Lock:
    """Keeps a file from being removed by any server that shares the folder. Released when it is closed, or the process
    ends."""

    def __init__(self, file: Path) -> None:
        """Raises `OSError` if the file is gone."""
        self._descriptor = os.open(file, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks, or somebody who removes it now
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def close(self) -> None:
        """May be called twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Stay:
    """A session file, or the checkpoint of an ingest that was interrupted, as it is on disk."""

    path: Path
    nbytes: int
    used_at: float


class SessionFiles:
    """Files called `<name>-<key>.tkv`; whatever else is in the folder is left alone.

    The cap holds for what all servers of the folder keep there. A file in use, by this process or another, never leaves
    (`Lock`). When each was last used is its access time, which this class sets.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """Creates the folder. Raises `SessionError` if no file can be written there."""
        self.folder, self.most_bytes = folder, most_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SessionError(f"{folder} is no folder for sessions: {error.strerror}.") from None
        check_target(folder / "session.tkv")

    def find(self, key: str) -> Path | None:
        """The file of this key, whatever its name begins with; None if there is none."""
        return min(self.folder.glob(f"*-{key[:DIGITS]}.tkv"), default=None)

    def name(self, key: str, film: str) -> Path:
        """The file of this key; if there is none, where it is to be written. film: a name, for people."""
        readable = re.sub(r"[^\w.-]+", "_", Path(film).stem).strip("._-")[:40] or "film"
        return self.find(key) or self.folder / f"{readable}-{key[:DIGITS]}.tkv"

    def use(self, file: Path) -> Lock | None:
        """Record that a file is used now, and keep it from being removed; None if it is gone."""
        try:
            lock = Lock(file)
        except OSError:
            return None
        with suppress(OSError):  # another user's file
            os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))  # an open session checks the second
        return lock

    def stays(self) -> list[Stay]:
        """All that counts, the least recently used first."""
        return sorted(self._stays(), key=lambda stay: stay.used_at)

    def _stays(self) -> Iterator[Stay]:
        for entry in os.scandir(self.folder):
            with suppress(OSError):  # removed since
                if _OURS.fullmatch(entry.name) and entry.is_file():
                    yield Stay(Path(entry.path), entry.stat().st_size, entry.stat().st_atime)
                elif _CHECKPOINT.fullmatch(entry.name) and entry.is_dir():
                    files = [file.stat() for file in os.scandir(entry.path) if file.name != "lock"]
                    nbytes = sum(file.st_size for file in files)
                    yield Stay(Path(entry.path), nbytes, max((file.st_mtime for file in files), default=0.0))

    def make_room(self, nbytes: int) -> bool:
        """Remove least recently used sessions until `nbytes` more fit under the cap and on the disk; returns whether
        they do. Removes none if they never will."""
        if nbytes > self.most_bytes:
            return False
        stays = self.stays()
        used = sum(stay.nbytes for stay in stays)
        for stay in stays:
            if used + nbytes <= self.most_bytes and nbytes <= shutil.disk_usage(self.folder).free:
                break
            if _remove(stay.path):
                used -= stay.nbytes
        return used + nbytes <= self.most_bytes


def _remove(path: Path) -> bool:
    """Remove a session file with what is beside it, or a checkpoint, unless it is in use; returns whether."""
    if path.suffix == ".checkpoint":
        try:
            locked(path).remove()
        except SessionError:
            return False
        return not path.exists()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return not path.exists()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:  # a file system without locks: a file that is mapped stays valid for its reader
        pass
    try:
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            return False  # replaced by another server just now
        path.unlink()
        path.with_name(path.name + SUFFIX).unlink(missing_ok=True)
    except OSError:
        return not path.exists()
    finally:
        os.close(descriptor)
    remove_leftover(checkpoint_path(path))
    return True
