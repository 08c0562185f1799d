"""Progress bars on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[int, int | None], None]
"""Called with units done and the total, None while the total is unknown."""

SECONDS_BETWEEN = 0.2
"""Least time between two drawings of what the stages are at."""


@contextmanager
def progress_bar(name: str, unit: str, shown: bool = True) -> Iterator[Progress]:
    """A bar; yields the function that moves it. unit: "B" for bytes, which are shown in kB, MB and so on."""
    with tqdm(desc=name, unit=unit, unit_scale=unit == "B", disable=not shown, leave=True) as bar:

        def move(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield move


class IngestProgress:
    """One bar for decoding, encoding and prefill: it counts what has come through all three.

    Each of the three methods may be called from its stage's own thread.
    """

    def __init__(self, shown: bool, tokens: int, seconds: float | None) -> None:
        """tokens: prompt tokens expected. seconds: length of the video, where known."""
        self._seconds, self._decoded, self._encoded = seconds, 0.0, 0
        self._told = 0.0
        self._bar = tqdm(desc="ingest", unit=" tokens", total=tokens, disable=not shown, leave=True)

    def decoded(self, seconds: float) -> None:
        """The decoder has come this far, in seconds of video."""
        self._decoded = seconds
        self._tell()

    def encoded(self, tokens: int) -> None:
        """The vision tower has made this many tokens more."""
        self._encoded += tokens
        self._tell()

    def prefilled(self, tokens: int) -> None:
        """The decoder model has taken this many tokens more."""
        self._bar.update(tokens)
        self._tell()

    def _tell(self) -> None:
        if self._bar.disable or time.monotonic() < self._told + SECONDS_BETWEEN:
            return
        self._told = time.monotonic()
        length = "" if self._seconds is None else f" of {_clock(self._seconds)}"
        self._bar.set_postfix_str(f"decoded {_clock(self._decoded)}{length}, encoded {self._encoded:,}")

    def close(self, complete: bool) -> None:
        """End the bar. complete: everything came through, so that what is done is the total."""
        if complete:
            self._bar.total = self._bar.n
        self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
