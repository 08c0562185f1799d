"""PyAV, imported when a video file is opened: arrays of frames need none. Says what a file may make FFmpeg open.

Used as `from tieredkv.video import pyav as av`.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from tieredkv.errors import VideoError

_options = {"protocol_whitelist": "file"}
"""Of every container: what a playlist names is opened only if it is a file."""


def open(file: Any, **arguments: Any) -> Any:
    """`av.open` for reading, under the restrictions of this process."""
    return __getattr__("open")(file, options=dict(_options), **arguments)


def restrict(formats: Iterable[str], streams: int) -> None:
    """From now on this process opens no file of another format, or with more streams.

    formats: FFmpeg's names. For a process that reads files of strangers; there is no way back.
    """
    _options.update(format_whitelist=",".join(formats), max_streams=str(streams))


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
