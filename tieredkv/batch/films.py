"""The films that a folder or a glob stands for."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from tieredkv.errors import BatchError
from tieredkv.video.suffixes import FILMS


def films(name: str, folder: Path) -> list[str] | None:
    """The films, sorted, if `name` is a folder or a glob; None if it is the name of one file.

    name, and what is returned: absolute, or relative to `folder`. A folder stands for the films directly in it. A glob
    that ends in a suffix, such as "*.dat", takes every file that it matches, any other glob films only; "**" stands
    for any folders. Hidden files are left out. Raises `BatchError` if there is no film.
    """
    path, suffix = folder / name, os.path.splitext(name)[1]
    if name and os.path.isdir(path):
        try:
            found = [str(Path(name) / entry) for entry in os.listdir(path) if not entry.startswith(".")]
        except OSError as error:
            raise BatchError(f"{path} cannot be read: {error.strerror}.") from None
        suffix = ""
    elif _is_glob(name) and not os.path.lexists(path):
        found = glob.glob(name, root_dir=folder, recursive=True)
    else:
        return None
    if not suffix[1:].isalnum():
        found = [file for file in found if os.path.splitext(file)[1].lower() in FILMS]
    if files := sorted(file for file in found if not os.path.isdir(folder / file)):
        return files
    raise BatchError(f"{path}: there is no film of that name, or in that folder ({' '.join(FILMS)}).")


def _is_glob(name: str) -> bool:
    return any(character in name for character in "*?[") and "\0" not in name and "://" not in name
