"""What `model` names if it is text: a folder or a hub id. Wrong names are refused before anything heavy is imported."""

from __future__ import annotations

import os
import re
import socket
import urllib.parse
import urllib.request
from pathlib import Path

from tieredkv.errors import UnsupportedModelError

WHAT_IS_A_MODEL = "a transformers model, a local path, or a hub id"
REACH_S = 3.0
"""Seconds in which the hub must answer; its client would try for half a minute."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def check_source(source: str | Path) -> None:
    """Raise `UnsupportedModelError`, with what to do, for a path with no model or text that can be no hub id.

    A folder is only looked into for files of other formats. The hub is not asked.
    """
    text = os.fspath(source)
    path = Path(text)
    try:
        is_folder, is_file = bool(text) and path.is_dir(), path.is_file()
    except (OSError, ValueError):  # too long, or with a null character
        is_folder = is_file = False
    if text.lower().endswith(".gguf") or (is_folder and _only_gguf(path)):
        raise UnsupportedModelError(
            f"{source} is in GGUF, llama.cpp's format, which tieredkv does not read: give the model it was made from "
            "as transformers stores it (a folder with config.json, or a hub id); weights='4bit' makes that small too."
        )
    if is_file:
        raise UnsupportedModelError(f"{source} is a file: give the model's folder, which holds config.json.")
    if is_folder:
        if not (path / "config.json").exists():
            raise UnsupportedModelError(f"{source}: no usable model found there (the folder has no config.json).")
        return
    if _is_path(source) or not is_hub_id(text):
        raise UnsupportedModelError(f"{source}: no usable model found there (there is no such folder).")


def is_hub_id(text: str) -> bool:
    """Whether the hub allows this as the name of a model."""
    return _HUB_ID.fullmatch(text) is not None and len(text) <= 96 and ".." not in text and "--" not in text


def is_local(source: str | Path) -> bool:
    """Whether only this machine's files are to be used: for a folder, or a hub id that was loaded before while the hub
    cannot be reached. Raises `UnsupportedModelError` for a hub id that cannot be loaded now."""
    if Path(source).is_dir():
        return True
    from huggingface_hub import constants, try_to_load_from_cache

    offline = constants.HF_HUB_OFFLINE
    if not offline and _reachable(constants.ENDPOINT):
        return False
    if isinstance(try_to_load_from_cache(str(source), "config.json"), str):
        return True
    reason = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached"
    raise UnsupportedModelError(
        f"{source}: there is no such folder, and {reason}, where it would be a hub id: give the folder of a model, or "
        f"download it where there is a network (hf download {source})."
    )


def _only_gguf(folder: Path) -> bool:
    return not (folder / "config.json").exists() and any(folder.glob("*.gguf"))


def _is_path(source: str | Path) -> bool:
    """Whether this was meant as a path: it begins or ends like one, has several folders, or begins with one of this
    folder's."""
    text = os.fspath(source)
    begins = text.startswith(("/", ".", "~", "\\")) or text.endswith(("/", "\\")) or "\\" in text
    first, _, rest = text.partition("/")
    return isinstance(source, Path) or begins or "/" in rest or (bool(rest) and Path(first).is_dir())


def _reachable(endpoint: str) -> bool:
    """Whether the hub's host accepts connections. Behind a proxy it is taken to."""
    url = urllib.parse.urlsplit(endpoint)
    if url.scheme in urllib.request.getproxies():
        return True
    try:
        socket.create_connection((url.hostname or "", url.port or 443), REACH_S).close()
    except OSError:
        return False
    return True
