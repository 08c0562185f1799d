"""Where evidence can be written, and what of it can be asked for: checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tieredkv.errors import OptionError
from tieredkv.storage import atomic

SUFFIXES = (".png", ".html")
Wanted = bool | Literal["tokens"]
"""Whether to find moments; "tokens": also those of every token."""


def check_target(path: Path) -> None:
    """Raise `OptionError` or `OutputError` for a file that `save_evidence` could not write."""
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"{path}: give a file name that ends in .png or .html.")
    atomic.check_target(path)


def check_wanted(evidence: object) -> None:
    """Raise `OptionError` unless this is one of `Wanted`."""
    if not (isinstance(evidence, bool) or evidence == "tokens"):
        raise OptionError(f"evidence={evidence!r} is not valid: give True, False or 'tokens'.")
