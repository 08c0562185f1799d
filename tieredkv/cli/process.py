"""How the command's process starts and ends: quickly, and without a traceback where it is interrupted."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""Exit code, as of a program that the shell ended by an interrupt."""


@contextmanager
def quick_imports() -> Iterator[None]:
    """For imports that take seconds: garbage is not collected, and an interrupt ends the process at once.

    Collecting takes a quarter of the time that imports of torch and transformers take, and finds nothing. An exception
    raised in the middle of an import may be swallowed there, or shown as another one; there is nothing to clean up.
    """
    collected, first = gc.isenabled(), "torch" not in sys.modules
    ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    gc.disable()
    if ours:
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if first:
            gc.freeze()  # what was imported lives to the end
        if collected:
            gc.enable()


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"tieredkv: interrupted.\n")
    os._exit(INTERRUPTED)


def leave() -> None:
    """Call last: the exit code is decided, and neither a late interrupt nor a closed pipe changes it.

    Nothing is collected any more, which would take a second after torch.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would flush it again
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
