"""Progress bars of the stages of ingest, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from tieredkv.video.frames import Progress


class Stages:
    """Makes one bar per stage, or none at all when progress was not asked for."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown

    @contextmanager
    def __call__(self, name: str, unit: str) -> Iterator[Progress]:
        """A bar for stage `name`; yields the function that moves it: units done, and the total once it is known."""
        with tqdm(desc=name, unit=f" {unit}", disable=not self.shown, leave=True) as bar:

            def move(done: int, total: int | None) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield move
