"""Reading events that take long: by a task of its own, which is stopped when nobody wants them any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

E = TypeVar("E")
T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection: there is nobody to answer."""


class Reading(Generic[E]):
    """Reads a generator to its end. One task does, so that the generator may hold locks, and time may be measured
    while an event is waited for."""

    def __init__(self, events: AsyncGenerator[E, None]) -> None:
        """events: closed at its end, after an error, and by `stop`."""
        self._items: asyncio.Queue[E | _End] = asyncio.Queue()
        self._task = asyncio.create_task(self._read(events))

    async def _read(self, events: AsyncGenerator[E, None]) -> None:
        end = _End()
        try:
            try:
                async for event in events:
                    self._items.put_nowait(event)
            finally:
                await events.aclose()
        except Exception as error:  # noqa: BLE001  raised again for the reader
            end = _End(error)
        finally:
            self._items.put_nowait(end)

    async def next(self, seconds: float | None = None) -> E | None:
        """The next event; None if there is none yet after `seconds`. Raises what the generator raises, and
        `StopAsyncIteration` after its last event."""
        try:
            async with asyncio.timeout(seconds):
                item = await self._items.get()
        except TimeoutError:
            return None
        if isinstance(item, _End):
            self._items.put_nowait(item)
            raise StopAsyncIteration if item.error is None else item.error
        return item

    async def stop(self) -> None:
        """Close the generator, and wait until it is closed. May be called twice."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class _End:
    """Follows the last event."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client closes its connection: then raises `ClientGone`.

    receive: ASGI's, after the whole body was read.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
