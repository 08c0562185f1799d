"""Answers for asyncio: generated on their own thread like streams, awaited on the event loop, stopped by cancelling."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any, Literal, overload

from tieredkv.session.job import End, Job, Work
from tieredkv.session.results import Generation
from tieredkv.session.stream import PendingAnswer

GenerationCoroutine = Coroutine[Any, Any, Generation]
_POLL_S = 0.5
"""Seconds between checks whether a thread has ended."""


class AsyncAnswerStream(PendingAnswer):
    """Asynchronous iterator of the pieces of an answer; joined, they are `generation.text`.

    The work begins when the first piece is asked for. Cancelling the task that waits for a piece, `aclose`, leaving it
    as an asynchronous context manager, or dropping it stops the work within one decoding step, or during prefill within
    one chunk. Only dropping it does not wait until the work has stopped.
    """

    def __init__(self, work: Work, streams: bool = True) -> None:
        super().__init__(work, streams)
        self._items: asyncio.Queue[str | End] = asyncio.Queue()
        self._over = asyncio.Event()

    def __aiter__(self) -> AsyncAnswerStream:
        return self

    async def __anext__(self) -> str:
        if self._ended:
            raise StopAsyncIteration
        self._check_process()
        if not self._job.started:
            self._job.start(_deliverer(self._job, self._items, self._over))
        try:
            piece = self._take(await self._items.get())
        except BaseException:  # an error of the work, or a cancellation here
            await self.aclose()
            raise
        if piece is None:
            await self.aclose()
            raise StopAsyncIteration
        return piece

    async def finished(self) -> Generation:
        """The whole answer."""
        async for _ in self:
            pass
        return self.generation

    async def aclose(self) -> None:
        """Stop the work and wait until it has stopped. May be called twice."""
        self._ended = True
        self._job.stop()
        cancelled = False
        while self._job.started and self._job.running and not self._over.is_set():
            try:
                # If the loop that the work reports to is closed, `_over` is never set: also check the thread.
                await asyncio.wait_for(self._over.wait(), _POLL_S)
            except TimeoutError:
                continue
            except asyncio.CancelledError:
                cancelled = True  # raised below, once memory and threads are freed
        self._job.join()
        if cancelled:
            raise asyncio.CancelledError

    async def __aenter__(self) -> AsyncAnswerStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


def _deliverer(job: Job, items: asyncio.Queue[str | End], over: asyncio.Event) -> Callable[[str | End], None]:
    """A function that hands a job's items to the running loop, from any thread."""
    loop = asyncio.get_running_loop()

    def arrive(item: str | End) -> None:
        items.put_nowait(item)
        if isinstance(item, End):
            over.set()

    def deliver(item: str | End) -> None:
        try:
            loop.call_soon_threadsafe(arrive, item)
        except RuntimeError:  # the loop is closed: there is no reader
            job.stop()

    return deliver


class AsyncAsking(ABC):
    """`ask` and `chat` of a session for asyncio."""

    @abstractmethod
    def asking(self, prompt: str, options: dict[str, Any], *, chat: bool = False, stream: bool = False) -> Work:
        """The work of answering. Raises at once for errors that can be found before the work begins."""

    @overload
    def aask(self, prompt: str, *, stream: Literal[False] = ..., **options: Any) -> GenerationCoroutine: ...
    @overload
    def aask(self, prompt: str, *, stream: Literal[True], **options: Any) -> AsyncAnswerStream: ...
    def aask(self, prompt: str, *, stream: bool = False, **options: Any) -> Any:
        """`ask`, with its options, for asyncio: await it, or with `stream=True` iterate over it with `async for`.

        The event loop is not blocked. Cancelling stops the work within one decoding step, or during prefill within one
        chunk; the session can be asked again.
        """
        return answering(self.asking(prompt, options, stream=stream), stream)

    @overload
    def achat(self, prompt: str, *, stream: Literal[False] = ..., **options: Any) -> GenerationCoroutine: ...
    @overload
    def achat(self, prompt: str, *, stream: Literal[True], **options: Any) -> AsyncAnswerStream: ...
    def achat(self, prompt: str, *, stream: bool = False, **options: Any) -> Any:
        """`chat` for asyncio, used like `aask`. A cancelled turn leaves `history` unchanged."""
        return answering(self.asking(prompt, options, chat=True, stream=stream), stream)


def answering(work: Work, stream: bool) -> AsyncAnswerStream | GenerationCoroutine:
    """An iterator of the pieces, or a coroutine that returns the whole answer."""
    return AsyncAnswerStream(work) if stream else AsyncAnswerStream(work, streams=False).finished()
