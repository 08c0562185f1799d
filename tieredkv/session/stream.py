"""Answers read while they are generated: the work on its own thread, pieces of text delivered to any other.

The work never waits for a reader: unread pieces wait in an unbounded queue, so an answer that nobody reads to its end
does not keep the session from the next one.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from transformers.generation.streamers import BaseStreamer

from tieredkv.environment import forking
from tieredkv.environment.ambient import Ambient
from tieredkv.errors import OptionError, TieredKVError
from tieredkv.session.pipeline import Cancelled
from tieredkv.session.results import Generation

_POLL_S = 0.02
"""Seconds between checks, while another question is answered, whether to keep waiting."""


@dataclass(frozen=True, slots=True)
class Work:
    """An answer to be generated, its options checked."""

    run: Callable[[Job | None], Generation]
    """Generates it; with a job, on the job's thread and until the job's `check` raises."""
    line: deque[Job] = field(default_factory=deque)
    """Jobs of one session that began and have not ended, in order. The first has the turn."""


@dataclass(frozen=True, slots=True)
class End:
    """What follows the last piece: the answer, or why there is none; neither, if the work was stopped."""

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
        except BaseException as error:  # noqa: BLE001  raised again by whoever reads
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
        """Call `action`, which must not block, when the work is stopped; at once if it was."""
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
    """A thread that runs while the interpreter shuts down could crash it."""
    jobs = list(_running)
    for job in jobs:
        job.stop()
    for job in jobs:
        job.join()


def _after_fork() -> None:
    """No job continues in a forked process. (`Turns` clears the line of those that wait.)"""
    for job in _running:
        job.abandon()
    _running.clear()


forking.in_child(_after_fork)


class StableTextStreamer(BaseStreamer):
    """A transformers streamer that delivers text once no later token can change it.

    Held back at the end: white space, of which the whole text is stripped, and replacement characters, which stand for
    the first bytes of a character. All tokens are decoded each time, as an answer's text is not the sum of its tokens'.
    """

    def __init__(self, text: Callable[[list[int]], str], deliver: Callable[[str], None]) -> None:
        self._text, self._deliver = text, deliver
        self._prompt = True
        self._ids: list[int] = []
        self._sent = ""

    def put(self, value: Any) -> None:
        """Take the prompt, which is ignored, then generated tokens."""
        if self._prompt:
            self._prompt = False
            return
        self._ids.extend(value.flatten().tolist())
        text = self._text(self._ids).rstrip("\N{REPLACEMENT CHARACTER}").rstrip()
        if len(text) > len(self._sent) and text.startswith(self._sent):
            self._send(text)

    def end(self) -> None:
        """Does nothing: what is held back is delivered by `finish`, if the answer is complete."""

    def finish(self, text: str) -> None:
        """Deliver the rest of the whole text."""
        # Some tokenizers (byte fallback) change the last character if the answer ends inside the next one.
        while not text.startswith(self._sent):
            self._sent = self._sent[:-1]
        self._send(text)

    def _send(self, text: str) -> None:
        piece, self._sent = text[len(self._sent) :], text
        if piece:
            self._deliver(piece)


class PendingAnswer:
    """An answer that is being generated, as its reader sees it."""

    def __init__(self, work: Work, streams: bool = True) -> None:
        self._job = Job(work, streams)
        self._process = os.getpid()
        self._ended = False
        self._generation: Generation | None = None
        weakref.finalize(self, self._job.stop)  # nobody can read it after that

    @property
    def generation(self) -> Generation:
        """The complete answer. Raises `TieredKVError` before the end of the stream, or if it was stopped early."""
        if self._generation is not None:
            return self._generation
        if self._ended:
            raise TieredKVError("the stream ended before the answer was complete: ask again.")
        raise TieredKVError("the answer is not complete yet: read the stream to its end first.")

    def __reduce__(self) -> Any:
        raise TieredKVError("an answer that is being generated cannot be pickled or copied: give its `generation`.")

    def _check_process(self) -> None:
        """Raise `TieredKVError` in a forked process, which has no thread that generates the answer."""
        if self._process != os.getpid():
            self._ended = True
            raise TieredKVError("this answer was begun before the process was forked: ask again here.")

    def _take(self, item: str | End) -> str | None:
        """The piece, or None at the end. Raises what ended the work."""
        if isinstance(item, str):
            return None if self._ended else item
        self._ended = True
        self._generation = item.generation
        if (error := item.error) is not None:
            del item
            try:
                raise error
            finally:
                del error  # or its traceback would keep it, and all that the work used, alive
        return None


class AnswerStream(PendingAnswer):
    """Iterator of the pieces of an answer, generated meanwhile on another thread; joined, they are `generation.text`.

    (Except for a character that some tokenizers change if the answer ends inside the next one.) Raises what `ask`
    raises, after the pieces that came before. `close`, leaving it as a context manager, or dropping it stops the work
    within one decoding step, or during prefill within one chunk.
    """

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._items: SimpleQueue[str | End] = SimpleQueue()
        self._job.start(self._items.put)

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        if self._ended:
            raise StopIteration
        self._check_process()
        try:
            piece = self._take(self._items.get())
        except BaseException:  # an error of the work, or an interrupt here
            self.close()
            raise
        if piece is None:
            self._items.put(End())  # for another thread that waits for a piece
            self.close()
            raise StopIteration
        return piece

    def close(self) -> None:
        """Stop the work and wait until it has stopped. May be called twice."""
        self._ended = True
        self._job.stop()
        self._job.join()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def check_stream(stream: bool, options: dict[str, Any]) -> None:
    """Raise `OptionError` if the text is asked for in two ways."""
    if stream and options.get("streamer") is not None:
        raise OptionError("stream=True and streamer= were both given: give one of them.")
