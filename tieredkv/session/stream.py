"""Answers read while they are generated.

The work never waits for a reader: unread pieces wait in an unbounded queue, so an answer that nobody reads to its end
does not keep the session from the next one.
"""

from __future__ import annotations

import os
import weakref
from queue import SimpleQueue
from typing import Any

from tieredkv.errors import OptionError, TieredKVError
from tieredkv.session.job import End, Job, Work
from tieredkv.session.results import Generation


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
            raise TieredKVError("this answer was started before the process was forked: ask again here.")

    def _take(self, item: str | End) -> str | None:
        """The piece, or None at the end. Raises the error that ended the work."""
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

    (Exception: some tokenizers change the last character if the answer ends inside the next one.) Raises what `ask`
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
    """Raise `OptionError` if both `stream=True` and a streamer were given."""
    if stream and options.get("streamer") is not None:
        raise OptionError("stream=True and streamer= were both given: give one of them.")
