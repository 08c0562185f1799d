"""Answers taken while they are made: the work on a thread of its own, its pieces of text wherever they are read.

Making never waits for reading: what was made and not read yet waits in a queue without bounds, so that an answer nobody
goes on reading never keeps the session from the next one.
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
"""Seconds between looks at whether to go on waiting for a session that answers another question."""


@dataclass(frozen=True, slots=True)
class Work:
    """An answer to be made, its options checked."""

    run: Callable[[Job | None], Generation]
    """Makes it; for a job, on the job's thread and until the job's `check` raises."""
    line: deque[Job] = field(default_factory=deque)
    """Jobs of one session, begun and not ended. The first has its turn."""


@dataclass(frozen=True, slots=True)
class End:
    """What follows the last piece: the answer, or why there is none; neither, if the work was told to stop."""

    generation: Generation | None = None
    error: BaseException | None = None


class Job:
    """One piece of work on a thread of its own, which can be told to stop."""

    def __init__(self, work: Work, streams: bool) -> None:
        """streams: pieces of the text are delivered, not just the end."""
        self.streams = streams
        self._work = work
        self._pieces: Pieces | None = None
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
        """Begin. `deliver` is called on the job's thread with every piece, and at last with an `End`."""
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
            if self._pieces is not None:
                self._pieces.finish(generation.text)
            return End(generation)
        except BaseException as error:  # noqa: BLE001  raised again by whoever reads
            if self._stopped:
                return End()
            if isinstance(error, StopIteration | StopAsyncIteration):  # raised by a reader, they would mean the end
                wrapped = RuntimeError(f"{type(error).__name__} was raised while the answer was made.")
                wrapped.__cause__ = error
                return End(error=wrapped)
            return End(error=error)
        finally:
            self._work.line.remove(self)
            self._on_stop = None  # or the answer would hold its session, and that the model

    def pieces(self, text: Callable[[list[int]], str]) -> Pieces:
        """A streamer that delivers this job's pieces. text: as a whole, of generated tokens."""
        assert self._deliver is not None
        self._pieces = Pieces(text, self._deliver)
        return self._pieces

    def check(self) -> None:
        """Raise `Cancelled` if the work is to stop."""
        if self._stopped:
            raise Cancelled

    @contextmanager
    def turn(self, lock: Any) -> Iterator[None]:
        """Hold a session's lock, after the jobs begun before; whoever waits for it can still be stopped."""
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
        """Have `action`, which must not wait for anything, called when the work is to stop; at once if it is."""
        self._on_stop = action
        if self._stopped:
            action()

    def stop(self) -> None:
        """Tell the work to stop. Takes no lock and does not wait: the garbage collector calls it, from anywhere."""
        self._stopped = True
        action = self._on_stop
        if action is not None:
            action()

    def abandon(self) -> None:
        """Have nothing more to stop: the thread is not in this process."""
        self._on_stop = None

    def join(self) -> None:
        """Wait for the thread, unless it is the one that asks."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


_running: set[Job] = set()


@atexit.register
def _stop_all() -> None:
    """A thread that went on while the interpreter is taken down could crash it."""
    jobs = list(_running)
    for job in jobs:
        job.stop()
    for job in jobs:
        job.join()


def _after_fork() -> None:
    """No job goes on in a forked process. (Their sessions clear the line of those that had no turn yet.)"""
    for job in _running:
        job.abandon()
    _running.clear()


forking.in_child(_after_fork)


class Pieces(BaseStreamer):
    """A transformers streamer that cuts text where no later token changes it.

    Held back: white space, as the whole text is stripped of it at its end, and replacement characters, which stand for
    the first bytes of a character. All tokens are decoded each time: an answer's text is not the sum of its tokens'.
    """

    def __init__(self, text: Callable[[list[int]], str], deliver: Callable[[str], None]) -> None:
        self._text, self._deliver = text, deliver
        self._prompt = True
        self._ids: list[int] = []
        self._sent = ""

    def put(self, value: Any) -> None:
        """Take the prompt, which is not text of the answer, then generated tokens."""
        if self._prompt:
            self._prompt = False
            return
        self._ids.extend(value.flatten().tolist())
        text = self._text(self._ids).rstrip("\N{REPLACEMENT CHARACTER}").rstrip()
        if len(text) > len(self._sent) and text.startswith(self._sent):
            self._send(text)

    def end(self) -> None:
        """Nothing: what was held back is text only if the answer is complete, which `finish` says."""

    def finish(self, text: str) -> None:
        """Deliver the rest of the whole text."""
        # Some tokenizers (byte fallback) take back a character if the answer breaks off inside the next.
        while not text.startswith(self._sent):
            self._sent = self._sent[:-1]
        self._send(text)

    def _send(self, text: str) -> None:
        piece, self._sent = text[len(self._sent) :], text
        if piece:
            self._deliver(piece)


class Answer:
    """An answer that is being made, as seen by its reader."""

    def __init__(self, work: Work, streams: bool = True) -> None:
        self._job = Job(work, streams)
        self._process = os.getpid()
        self._ended = False
        self._generation: Generation | None = None
        weakref.finalize(self, self._job.stop)  # nobody can read it any more

    @property
    def generation(self) -> Generation:
        """The finished answer. Raises `TieredKVError` before the end of the stream, and for one that was cut short."""
        if self._generation is not None:
            return self._generation
        if self._ended:
            raise TieredKVError("the stream ended before the answer was complete: ask again.")
        raise TieredKVError("the answer is not complete yet: read the stream to its end first.")

    def __reduce__(self) -> Any:
        raise TieredKVError("an answer that is being made cannot be pickled or copied: give its `generation`.")

    def _check_process(self) -> None:
        """Raise `TieredKVError` in a forked process: the thread that makes the answer is not here."""
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
                del error  # or it would hold itself, by its traceback, and with it all that the work held
        return None


class AnswerStream(Answer):
    """Iterator of the pieces of an answer, made meanwhile on another thread; joined they are `generation.text`.

    (But for a character that some tokenizers take back where the answer breaks off inside the next.) Raises what `ask`
    raises, when the piece behind it is asked for. `close`, leaving it as a context manager, or dropping it stops the
    work within one decoding step, before that within one prefill chunk.
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
            self._items.put(End())  # for whoever else waits for a piece
            self.close()
            raise StopIteration
        return piece

    def close(self) -> None:
        """Stop the work and wait until it has stopped. Twice is fine."""
        self._ended = True
        self._job.stop()
        self._job.join()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def check_stream(stream: bool, options: dict[str, Any]) -> None:
    """Raise `OptionError` where the text is to go two ways."""
    if stream and options.get("streamer") is not None:
        raise OptionError("stream=True and streamer= were both given: give one of them.")
