"""Jobs: an answer is generated on its own thread, delivers its text to other threads, and can be stopped."""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tieredkv.environment import forking
from tieredkv.environment.ambient import Ambient
from tieredkv.session.pipeline import Cancelled
from tieredkv.session.results import Generation
from tieredkv.session.text_streamer import StableTextStreamer

_POLL_S = 0.02
"""Seconds between checks for a stop while a job waits for its turn."""


@dataclass(frozen=True, slots=True)
class Work:
    """An answer to be generated, with checked options."""

    run: Callable[[Job | None], Generation]
    """Generates the answer; with a job, on the job's thread until the job's `check` raises."""
    line: deque[Job] = field(default_factory=deque)
    """Jobs of one session that began and have not ended, in order. The first has the turn."""


@dataclass(frozen=True, slots=True)
class End:
    """Delivered after the last piece: the answer or the error; neither if the work was stopped."""

    generation: Generation | None = None
    error: BaseException | None = None


class Job:
    """Work on its own thread, which can be stopped."""

    def __init__(self, work: Work, streams: bool) -> None:
        """streams: deliver pieces of the text, not only the end."""
        self.streams = streams
        self._work = work
        self._streamer: StableTextStreamer | None = None
        self._deliver: Callable[[str | End], None] | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._on_stop: Callable[[], None] | None = None

    @property
    def started(self) -> bool:
        return self._thread is not None

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, deliver: Callable[[str | End], None]) -> None:
        """Begin. `deliver` is called on the job's thread with every piece, and finally with an `End`."""
        thread = threading.Thread(
            target=self._run, args=(deliver, Ambient(device=True)), name="tieredkv-answer", daemon=True
        )
        self._deliver = deliver
        self._work.line.append(self)
        _running.add(self)
        try:
            thread.start()
        except BaseException:
            self._work.line.remove(self)
            _running.discard(self)
            raise
        self._thread = thread

    def _run(self, deliver: Callable[[str | End], None], ambient: Ambient) -> None:
        with ambient.here():
            outcome = self._outcome()
        deliver(outcome)
        _running.discard(self)

    def _outcome(self) -> End:
        try:
            generation = self._work.run(self)
            if self._streamer is not None:
                self._streamer.finish(generation.text)
            return End(generation)
        except BaseException as error:  # noqa: BLE001  raised again for the reader
            if self._stopped:
                return End()
            if isinstance(error, StopIteration | StopAsyncIteration):  # would end the reader's iteration instead
                wrapped = RuntimeError(f"{type(error).__name__} was raised while the answer was generated.")
                wrapped.__cause__ = error
                return End(error=wrapped)
            return End(error=error)
        finally:
            self._work.line.remove(self)
            self._on_stop = None  # or the answer would keep its session, and the model, alive

    def streamer(self, text: Callable[[list[int]], str]) -> StableTextStreamer:
        """A streamer that delivers this job's pieces. text: the whole text of generated tokens."""
        assert self._deliver is not None
        self._streamer = StableTextStreamer(text, self._deliver)
        return self._streamer

    def check(self) -> None:
        """Raise `Cancelled` if the work was stopped."""
        if self._stopped:
            raise Cancelled

    @contextmanager
    def turn(self, lock: Any) -> Iterator[None]:
        """Hold a session's lock, after the jobs that began earlier; can be stopped while it waits."""
        while self._work.line[0] is not self:
            self.check()
            time.sleep(_POLL_S)
        while not lock.acquire(timeout=_POLL_S):
            self.check()
        try:
            self.check()
            yield
        finally:
            lock.release()

    def on_stop(self, action: Callable[[], None]) -> None:
        """Call `action`, which must not block, when the work is stopped; at once if it already was."""
        self._on_stop = action
        if self._stopped:
            action()

    def stop(self) -> None:
        """Stop the work, without waiting. Takes no lock: the garbage collector calls it, on any thread."""
        self._stopped = True
        action = self._on_stop
        if action is not None:
            action()

    def abandon(self) -> None:
        """Forget what to call on `stop`: the thread is not in this process."""
        self._on_stop = None

    def join(self) -> None:
        """Wait for the thread, unless it is the current one."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


_running: set[Job] = set()


@atexit.register
def _stop_all() -> None:
    """Stop every job: a thread that runs while the interpreter shuts down could crash it."""
    jobs = list(_running)
    for job in jobs:
        job.stop()
    for job in jobs:
        job.join()


def _after_fork() -> None:
    """No job continues in a forked process. (`Turns` clears its line of waiting jobs.)"""
    for job in _running:
        job.abandon()
    _running.clear()


forking.in_child(_after_fork)
