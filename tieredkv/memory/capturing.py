"""Captures of CUDA graphs: one at a time, and apart from what CUDA forbids or would swallow meanwhile.

While a stream of a card is captured, no thread may wait for that stream or for the card, and what another thread queues
on a captured stream becomes part of the graph instead of being done. torch takes streams from a pool of 32 a card, so
two sessions may well have the same one. Captures therefore hold `CAPTURE`, and so does whoever waits for a card or
queues work on a stream of its own.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

CAPTURE = threading.RLock()


@contextmanager
def capturing() -> Iterator[None]:
    """Around a capture. Garbage is not collected meanwhile: a cache that nobody closed would wait for the card."""
    with CAPTURE:
        collected = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collected:
                gc.enable()
