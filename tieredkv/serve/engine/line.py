"""Line: requests that wait for the model. Bounded, and fair: clients are served in turn, each in its own order."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from typing import Generic, TypeVar

from tieredkv.serve.errors import ApiError

T = TypeVar("T")

RECENT = 20
"""Requests whose durations say how long the next will take."""
LONGEST_WAIT_S = 600
"""Largest `Retry-After`."""


class Line(Generic[T]):
    """A queue for asyncio. All methods are called on the event loop."""

    def __init__(self, most: int) -> None:
        """most: how many may wait."""
        self._most = most
        self._clients: OrderedDict[str, deque[T]] = OrderedDict()
        """What each waits for; the first client is served next. None is empty."""
        self._filled = asyncio.Event()
        self._durations: deque[float] = deque(maxlen=RECENT)

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def join(self, client: str, item: T) -> None:
        """Wait. Raises `ApiError` 429 if as many wait as may."""
        if (waiting := len(self)) >= self._most:
            seconds = self.wait_s(waiting + 1)
            raise ApiError(
                429,
                f"{waiting} requests are waiting, which is all that the server takes: try again in {seconds} s.",
                code="queue_full",
                retry_after=seconds,
            )
        self._clients.setdefault(client, deque()).append(item)
        self._filled.set()

    def leave(self, client: str, item: T) -> bool:
        """Stop waiting, at once; returns whether the item was still in the line."""
        items = self._clients.get(client)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._clients[client]
        return True

    def ahead(self, client: str, item: T) -> int:
        """How many are taken before an item that waits, if nobody joins or leaves."""
        own = self._clients[client].index(item)
        count, passed = own, False
        for other, items in self._clients.items():
            if other == client:
                passed = True
            else:
                count += min(len(items), own if passed else own + 1)
        return count

    async def take(self) -> tuple[T, ...]:
        """Wait for what is served next, and take it out of the line: a group that is served together, of one item as
        long as the model answers one question at a time."""
        while not self._clients:
            self._filled.clear()
            await self._filled.wait()
        client, items = next(iter(self._clients.items()))
        item = items.popleft()
        del self._clients[client]
        if items:
            self._clients[client] = items  # after the others
        return (item,)

    def clear(self) -> list[T]:
        """Take out all, in no order."""
        items = [item for waiting in self._clients.values() for item in waiting]
        self._clients.clear()
        return items

    # ---- durations

    def served(self, seconds: float) -> None:
        """Record how long serving one took."""
        self._durations.append(seconds)

    def wait_s(self, place: int) -> int:
        """Whole seconds until about `place` more have been served, at least 1; for `Retry-After`."""
        mean = sum(self._durations) / len(self._durations) if self._durations else 1.0
        return min(LONGEST_WAIT_S, max(1, math.ceil(mean * place)))
