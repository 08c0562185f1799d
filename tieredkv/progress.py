"""Progress bars on stderr, and times as players show them."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[int, int | None], None]
"""Called with units done and the total, None while the total is unknown."""

SECONDS_BETWEEN = 0.2
"""Least time between two updates of the text beside the bar."""


@contextmanager
def progress_bar(name: str, unit: str, shown: bool = True) -> Iterator[Progress]:
    """A bar; yields the function that moves it. unit: "B" for bytes, which are shown in kB, MB and so on."""
    with tqdm(desc=name, unit=unit, unit_scale=unit == "B", disable=not shown, leave=True) as bar:

        def move(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield move


def note(text: str, shown: bool = True) -> None:
    """A line on stderr, before the bars."""
    if shown:
        print(f"tieredkv: {text}", file=sys.stderr, flush=True)


class IngestProgress:
    """One bar for decoding, encoding and prefill: it counts tokens that have passed all three.

    Each of the three methods may be called from its stage's own thread.
    """

    def __init__(self, shown: bool, tokens: int, seconds: float | None) -> None:
        """tokens: prompt tokens expected. seconds: length of the video, if known."""
        self._length = "" if seconds is None else f" of {timecode(seconds)}"
        self._decoded, self._encoded = 0.0, 0
        self._updated_at = 0.0
        self._bar = tqdm(desc="ingest", unit=" tokens", total=tokens, disable=not shown, leave=True)

    def resumed(self, tokens: int, seconds: float) -> None:
        """The first `tokens` tokens, and the video's first `seconds` seconds, were done by an earlier ingest."""
        self._bar.initial = self._bar.n = tokens
        if not self._bar.disable:
            self.say(f"continuing at {timecode(seconds)}{self._length}.")

    def restarted(self, why: str) -> None:
        """What `resumed` reported was of no use."""
        self._bar.initial = self._bar.n = 0
        self.say(f"{why} The video is ingested from its beginning.")

    def say(self, text: str) -> None:
        """One line on stderr; a warning where no bar is shown."""
        if self._bar.disable:
            warnings.warn(text, stacklevel=3)
        else:
            self._bar.write(f"tieredkv: {text}", file=sys.stderr)

    def decoded(self, seconds: float) -> None:
        """The decoder has reached this second of the video."""
        self._decoded = seconds
        self._update_text()

    def encoded(self, tokens: int) -> None:
        """The vision tower has produced this many more tokens."""
        self._encoded += tokens
        self._update_text()

    def prefilled(self, tokens: int) -> None:
        """This many more tokens are cached."""
        self._bar.update(tokens)
        self._update_text()

    def _update_text(self) -> None:
        if self._bar.disable or time.monotonic() < self._updated_at + SECONDS_BETWEEN:
            return
        self._updated_at = time.monotonic()
        self._bar.set_postfix_str(f"decoded {timecode(self._decoded)}{self._length}, encoded {self._encoded:,}")

    def close(self, complete: bool) -> None:
        """End the bar. complete: every token was processed, so the count so far is the total."""
        if complete:
            self._bar.total = self._bar.n
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
