"""What lies beside a session file while its video is ingested. Imports nothing heavy."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tieredkv.errors import SessionError
from tieredkv.storage.locked_folder import LockedFolder

STATE, CACHE = "state", "cache"
"""The files of a checkpoint."""


def checkpoint_path(session: Path) -> Path:
    """The folder of the checkpoint of a session that is to be saved there."""
    return session.with_name(f"{session.name}.checkpoint")


def locked(checkpoint: Path) -> LockedFolder:
    """The folder of a checkpoint, created if there is none. Raises `SessionError` if it is in use or another's."""
    return LockedFolder(checkpoint, (STATE, CACHE))


def check_free(checkpoint: Path) -> None:
    """Raise `SessionError` if another process uses a checkpoint, or the folder is not one. Creates none."""
    if checkpoint.is_dir():
        locked(checkpoint).close()


def remove_leftover(checkpoint: Path) -> None:
    """Remove the checkpoint of a session that is saved, unless it is in use."""
    if checkpoint.is_dir():
        with suppress(SessionError):
            locked(checkpoint).remove()
