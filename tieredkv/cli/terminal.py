"""An answer on stdout while it is generated, and how Ctrl-C stops it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TextStreamer

from tieredkv.progress import TokenCount


class Stopped(Exception):
    """The answer was stopped by the user."""


class TerminalStreamer(TextStreamer):
    """Writes whole words as they are generated: `Generation.text` in the end, and a newline after it."""

    def __init__(self, tokenizer: Any, shown: bool = True) -> None:
        """shown: if False, only the number of tokens is, at a terminal and until the end; the answer can be stopped."""
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stopped = False
        self.wrote_text = False
        """Whether any text other than white space was written."""
        self._shown, self._blanks = shown, ""
        self._count = TokenCount(not shown)

    def put(self, value: Any) -> None:
        """Take the next token. Raises `Stopped` if `stopped` is set: between tokens the state is consistent."""
        if self.stopped:
            raise Stopped
        if not self.next_tokens_are_prompt:
            self._count.add()
        super().put(value)

    def end(self) -> None:
        """The answer is complete, or has failed."""
        self._count.close()
        super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write text, except blanks at the beginning and end of the answer."""
        text = self._blanks + text if self.wrote_text else text.lstrip()
        words = text.rstrip()
        self._blanks = text[len(words) :]
        self.wrote_text |= bool(words)
        if self._shown:
            sys.stdout.write(words + ("\n" if stream_end and self.wrote_text else ""))
            sys.stdout.flush()


@contextmanager
def stopped_by_interrupt(streamer: TerminalStreamer) -> Iterator[None]:
    """The first Ctrl-C stops the answer at its next token; a second one interrupts as usual, at once."""

    def stop(number: int, frame: Any) -> None:
        streamer.stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A request to end the process (SIGTERM, or SIGHUP of a closed terminal) raises `SystemExit` in the block, so that
    what must be done at the end is done. Ignored signals stay ignored."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    numbers = [
        getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
    ]  # Windows has no SIGHUP
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) is signal.SIG_DFL}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
