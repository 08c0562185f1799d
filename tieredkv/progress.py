"""Progress on stderr, and times as players show them: bars at a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

Progress = Callable[[int, int | None], None]
"""Called with units done and the total, None while the total is unknown."""

SECONDS_BETWEEN = 0.2
"""Least time between two updates of the text beside the bar."""
SECONDS_BETWEEN_LINES = 30.0
"""The same between two lines where stderr is no terminal, as in a log."""


def at_terminal() -> bool:
    """Whether somebody watches stderr."""
    return sys.stderr is not None and sys.stderr.isatty()


def tell(text: str, shown: bool = True) -> None:
    """A line on stderr that a log should hold too."""
    if shown:
        print(f"tieredkv: {text}", file=sys.stderr, flush=True)


def note(text: str) -> None:
    """A line on stderr about what takes its time now; nothing where nobody watches."""
    if at_terminal():
        print(text, file=sys.stderr, flush=True)


class _Lines:
    """A bar for a log: a line every half minute and one at the end, without control characters."""

    def __init__(self, name: str, unit: str, total: int | None) -> None:
        self.n = self.initial = 0
        self.total, self.disable = total, False
        self._name, self._unit, self._text = name, unit, ""
        self._next = time.monotonic() + SECONDS_BETWEEN_LINES
        self._closed = False

    def update(self, n: int) -> None:
        self.n += n
        if time.monotonic() >= self._next:
            self._write()

    def set_postfix_str(self, s: str) -> None:
        self._text = s

    def write(self, text: str, file: Any) -> None:
        print(text, file=file, flush=True)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._write()

    def _write(self) -> None:
        self._next = time.monotonic() + SECONDS_BETWEEN_LINES
        total = "" if self.total is None or self.total == self.n else f" of {self._count(self.total)}"
        text = f", {self._text}" if self._text else ""
        print(f"{self._name}: {self._count(self.n)}{total}{self._unit}{text}", file=sys.stderr, flush=True)

    def _count(self, number: float) -> str:
        return tqdm.format_sizeof(number) if self._unit == "B" else f"{number:,}"


def _bar(name: str, unit: str, shown: bool, total: int | None = None, leave: bool = True) -> Any:
    if shown and not at_terminal():
        return _Lines(name, unit, total)
    return tqdm(desc=name, unit=unit, unit_scale=unit == "B", total=total, disable=not shown, leave=leave)


@contextmanager
def progress_bar(name: str, unit: str, shown: bool = True) -> Iterator[Progress]:
    """A bar; yields the function that moves it. unit: "B" for bytes, which are shown in kB, MB and so on."""
    bar = _bar(name, unit, shown)

    def move(done: int, total: int | None) -> None:
        bar.total = total
        bar.update(done - bar.n)

    try:
        yield move
    finally:
        bar.close()


class TokenCount:
    """How many tokens an answer has so far, where somebody watches; nothing is left of it at the end."""

    def __init__(self, shown: bool = True) -> None:
        self._bar = _bar("answer", " tokens", shown and at_terminal(), leave=False)

    def add(self) -> None:
        """One more token."""
        self._bar.update(1)

    def close(self) -> None:
        """May be called twice."""
        self._bar.close()


class IngestProgress:
    """One bar for decoding, encoding and prefill: it counts tokens that have passed all three.

    Each of the three methods may be called from its stage's own thread.
    """

    def __init__(self, shown: bool, tokens: int, seconds: float | None, report: Progress | None = None) -> None:
        """tokens: prompt tokens expected. seconds: length of the video, if known. report: called with the tokens that
        are cached, and how many are expected, on the thread that prefills."""
        self._done, self._expected, self._report = 0, tokens, report
        self._length = "" if seconds is None else f" of {timecode(seconds)}"
        self._before, self._decoded, self._encoded = 0.0, 0.0, 0
        self._updated_at = 0.0
        self._bar = _bar("ingest", " tokens", shown, tokens)

    def resumed(self, tokens: int, seconds: float) -> None:
        """The first `tokens` tokens, and the video's first `seconds` seconds, were done by an earlier ingest."""
        self._bar.initial = self._bar.n = tokens
        self._count(tokens)
        if not self._bar.disable:
            self.say(f"continuing at {timecode(seconds)}{self._length}.")

    def restarted(self, why: str) -> None:
        """What `resumed` reported was of no use."""
        self._bar.initial = self._bar.n = 0
        self._count(0)
        self.say(f"{why} The video is ingested from its beginning.")

    def say(self, text: str) -> None:
        """One line on stderr; a warning where no bar is shown."""
        if self._bar.disable:
            warnings.warn(text, stacklevel=3)
        else:
            self._bar.write(f"tieredkv: {text}", file=sys.stderr)

    def decoded(self, seconds: float) -> None:
        """The decoder has reached this second of the video."""
        self._decoded = self._before + seconds
        self._update_text()

    def passed(self, seconds: float) -> None:
        """A video of this length is cached, and another may follow."""
        self._before += seconds

    def encoded(self, tokens: int) -> None:
        """The vision tower has produced this many more tokens."""
        self._encoded += tokens
        self._update_text()

    def prefilled(self, tokens: int) -> None:
        """This many more tokens are cached."""
        self._bar.update(tokens)
        self._update_text()
        self._count(self._done + tokens)

    def _count(self, tokens: int) -> None:
        self._done = tokens
        if self._report is not None:
            self._report(tokens, self._expected)

    def _update_text(self) -> None:
        if self._bar.disable or time.monotonic() < self._updated_at + SECONDS_BETWEEN:
            return
        self._updated_at = time.monotonic()
        self._bar.set_postfix_str(f"decoded {timecode(self._decoded)}{self._length}, encoded {self._encoded:,}")

    def close(self, complete: bool) -> None:
        """End the bar. complete: every token was processed, so the count so far is the total."""
        if complete:
            self._bar.total = self._bar.n
        self._updated_at = 0.0
        self._update_text()
        self._bar.close()


def spans_text(spans: Sequence[tuple[float, float]], most: int = 5) -> str:
    """Spans of seconds for people, the first `most` of them, and how many seconds they are together."""
    shown = [" to ".join(f"{timecode(at)}.{int(at * 10 + 1e-6) % 10}" for at in span) for span in spans[:most]]
    more = [f"{len(spans) - most} more"] if len(spans) > most else []
    return f"{', '.join(shown + more)} ({sum(end - begin for begin, end in spans):.1f} s)"


def timecode(seconds: float, hours: bool = False) -> str:
    """Seconds as m:ss, or h:mm:ss from one hour on or if `hours`; fractions are dropped."""
    minutes, rest = divmod(int(seconds + 1e-6), 60)
    if hours or minutes >= 60:
        return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
    return f"{minutes}:{rest:02}"
