"""The manifest of a session file, read without torch: enough to refuse another file before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tieredkv.errors import SessionError
from tieredkv.storage import header

PARTS = ("model", "model_settings", "processor", "tiers", "session")
"""What every session file holds."""


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a session file.

    Raises `SessionError` for a file that is missing, no session, in a newer format, cut short or damaged in its header.
    """
    manifest = header.read(path).manifest
    check_manifest(path, manifest)
    return manifest


def check_manifest(path: str | Path, manifest: Any) -> None:
    """Raise `SessionError` if a file's manifest is not a session's."""
    absent = [part for part in PARTS if not isinstance(manifest, dict) or part not in manifest]
    if absent:
        raise SessionError(f"{path} holds no session (there is no {absent[0]!r} in it).")
    if not isinstance(manifest["tiers"], dict):
        kind = type(manifest["tiers"]).__name__
        raise SessionError(f"{path} holds no session (its settings are of type {kind}).")
