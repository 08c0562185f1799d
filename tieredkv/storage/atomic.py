"""Writes a file whole or not at all, whatever happens to the disk or the process.

The file is written in a temporary folder beside its target, `NAME.PID-NUMBER.part`, synced, and renamed to the target.
A kill at any moment leaves the old file or the new one; the next writer of the same file removes what a killed process
left. Processes and threads may write one file at the same time: the last to finish wins.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tieredkv.errors import OutputError
from tieredkv.memory.units import different_sizes

_numbers = itertools.count()
_open: set[str] = set()
"""Names of the temporary folders that this process is writing in."""


@contextmanager
def replace_file(path: Path, nbytes: int = 0) -> Iterator[Path]:
    """Yields the path to write to; when the block ends without an error, that file replaces `path`.

    nbytes: least size of the new file, if known; if the disk has less free, nothing is written. An old file that is
    mapped or open stays valid for its readers. A lock or a mode given to the temporary file survives the rename.
    Anything else written into its folder is discarded. After an error in the block `path` is unchanged and nothing
    temporary is left; an `OSError` becomes an `OutputError`.
    """
    with output_errors(path):
        _check_place(path)
        with _temporary_folder(path) as folder:
            check_space(path, nbytes)
            part = folder / path.name
            yield part
            with part.open("r+b") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        sync_folder(path.parent)


def check_target(path: Path) -> None:
    """Raise `OutputError` if `replace_file` could not write to `path`. Leaves nothing there."""
    with output_errors(path):
        _check_place(path)
        with _temporary_folder(path):
            pass


def check_space(path: Path, nbytes: int) -> None:
    """Raise `OutputError` if the disk of `path` has less than `nbytes` free.

    A file and the one that replaces it exist at the same time, so all of the new one must fit.
    """
    free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        needs, left = different_sizes(nbytes, free)
        raise OutputError(
            f"{path} needs {needs} of disk, {left} free in {path.absolute().parent}: free some, or save elsewhere."
        )


def check_name(path: Path) -> None:
    """Raise `OutputError` for a path that no file can have, in a message that can be printed."""
    try:
        valid = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        valid = False
    if not valid:
        raise OutputError(f"{str(path)!a} is not a file name (it contains a null or half a character): give another.")


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turns an `OSError` of writing to `path` into an `OutputError`."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror or error}.") from error


def sync_folder(folder: Path) -> None:
    """Make a new name in `folder` survive a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_place(path: Path) -> None:
    check_name(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder: give the name of a file.")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is not a file: give the name of one.")
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: there is no folder {path.absolute().parent}.")


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """A folder, because a writer such as safetensors' `save_file` may create temporary files of its own."""
    _remove_leftovers(path)
    folder = path.with_name(f"{path.name}.{os.getpid()}-{next(_numbers)}.part")
    _open.add(folder.name)  # before it exists, so that no other thread takes it for a leftover
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _open.discard(folder.name)


def _remove_leftovers(path: Path) -> None:
    """Remove what dead processes left of this file. In a container, a dead process may have had our own id."""
    for other in path.parent.iterdir():
        match = re.fullmatch(re.escape(path.name) + r"\.(\d{1,9})(-\d+)?\.part", other.name)
        if match is None or other.name in _open:
            continue
        if int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1])):
            shutil.rmtree(other, ignore_errors=True)
