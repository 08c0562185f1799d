"""An answer on stdout while it is made, and how Ctrl-C stops it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TextStreamer


class Stopped(Exception):
    """The answer that was being written is not wanted any more."""


class Pieces(TextStreamer):
    """Writes whole words as they come: in the end what `Generation.text` holds, and the end of the line."""

    def __init__(self, tokenizer: Any, shown: bool = True) -> None:
        """shown: False writes nothing; the answer can be stopped all the same."""
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stopped = False
        self._shown, self._begun, self._blanks = shown, False, ""

    def put(self, value: Any) -> None:
        """Take the next token. Raises `Stopped` once `stopped` is set: between two tokens nothing is half done."""
        if self.stopped:
            raise Stopped
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write text but for the blanks at the answer's beginning and end."""
        text = self._blanks + text if self._begun else text.lstrip()
        words = text.rstrip()
        self._blanks = text[len(words) :]
        self._begun |= bool(words)
        if self._shown:
            sys.stdout.write(words + ("\n" if stream_end and self._begun else ""))
            sys.stdout.flush()

    @property
    def begun(self) -> bool:
        """Whether anything but blanks came."""
        return self._begun


@contextmanager
def stopped_by_interrupt(pieces: Pieces) -> Iterator[None]:
    """Let the first Ctrl-C stop the answer at its next token; a second one interrupts as usual, and at once."""

    def stop(number: int, frame: Any) -> None:
        pieces.stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
