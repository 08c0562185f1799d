"""Request: a question on its way through the engine, and what its reader is told."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from tieredkv.serve.asked import Answer, Asked, Piece, Progress, Ready

Event = Progress | Piece | Answer | Ready


class Request:
    """Written by the engine, read by one reader. Events wait for the reader, however slow it is; of progress only the
    last does. All methods are called on the event loop."""

    def __init__(self, asked: Asked, key: str, system: str | None, options: dict[str, Any], prepares: bool) -> None:
        """key: of the session that it needs. system: its system prompt. options: generation options. prepares: whether
        the films are only to be ingested."""
        self.asked, self.key, self.system, self.options, self.prepares = asked, key, system, options, prepares
        self.arrived = time.monotonic()
        self.waits = True
        """Whether it is in the line."""
        self.ended = False
        """Nothing more is to be done for it."""
        self.answering: asyncio.Task[None] | None = None
        """What is cancelled if it ends early."""
        self.on_end: Callable[[], None] = lambda: None
        """Called once, when it ends for whatever reason."""
        self._stage, self._stage_began = "", self.arrived
        self._events: deque[Event] = deque()
        self._error: BaseException | None = None
        self._news = asyncio.Event()

    @property
    def client(self) -> str:
        """Whose it is."""
        return self.asked.client

    # ---- the engine's side

    def emit(self, event: Event) -> None:
        """Tell the reader, unless it has ended."""
        if self.ended:
            return
        if isinstance(event, Progress) and self._events and isinstance(self._events[-1], Progress):
            self._events.pop()
        self._events.append(event)
        self._news.set()
        if isinstance(event, Answer | Ready):
            self.answering = None  # it has nothing left to do
            self.end()

    def progress(self, stage: Any, done: int = 0, total: int | None = None) -> None:
        """Tell the reader what is being done."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._stage_began = stage, now
        self.emit(Progress(stage, done, total, now - self._stage_began))

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more happens. error: raised for the reader after the events before. May be called twice."""
        if self.ended:
            return
        self.ended, self._error = True, error
        self._news.set()
        if self.answering is not None:
            self.answering.cancel()
        self.on_end()

    # ---- the reader's side

    async def next(self, patience: float) -> Event | None:
        """The next event; None if there is none for so many seconds, or at the end. Raises the error that ended the
        request."""
        if not self._events and not self.ended:
            self._news.clear()
            try:
                async with asyncio.timeout(patience):
                    await self._news.wait()
            except TimeoutError:
                return None
        if self._events:
            return self._events.popleft()
        if (error := self._error) is not None:
            self._error = None
            try:
                raise error
            finally:
                del error  # or its traceback would keep all that the work used alive
        return None
