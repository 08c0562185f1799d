"""Work on other threads, for requests that may go away meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def stoppable(stop: threading.Event, work: Callable[[], T]) -> T:
    """What `work` returns. If the request is cancelled, `stop` is set, and nobody waits for the work to end."""
    try:
        return await asyncio.to_thread(work)
    except asyncio.CancelledError:
        stop.set()
        raise


async def finished(work: Callable[[], T]) -> T:
    """What `work`, which is short, returns. It has ended in any case, also if the request is cancelled."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
