"""PyAV, imported when a video file is opened: arrays of frames need none.

Used as `from tieredkv.video import pyav as av`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tieredkv.errors import VideoError


def __getattr__(name: str) -> Any:
    """A name of PyAV, or of its submodule. Raises `VideoError` where PyAV is not installed."""
    if name.startswith("__"):
        raise AttributeError(name)
    try:
        av = import_module("av")
    except ImportError as error:
        raise VideoError(
            f"a video file cannot be read without PyAV ({error}): pip install av, or give its frames as arrays."
        ) from None
    return getattr(av, name)
