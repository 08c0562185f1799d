"""Films and pictures of strangers as a session takes them, decoded in a process that can be killed."""

from __future__ import annotations

import json
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from tieredkv.errors import VideoError
from tieredkv.serve.asked import Film, Shown
from tieredkv.serve.media import wire
from tieredkv.serve.media.child import Child
from tieredkv.serve.media.identity import Identity, changed, open_known
from tieredkv.serve.media.limits import Limits
from tieredkv.video.media import Picture, Video
from tieredkv.video.sampling import Sampling, Tick
from tieredkv.video.subtitles import AUTO, Cue


class Sealed:
    """In place of a path: nothing else in the process can open it."""

    def __init__(self, film: Film, identity: Identity, limits: Limits) -> None:
        self.film, self.identity, self.limits = film, identity, limits

    def __repr__(self) -> str:
        return self.film.name

    def open(self, sampling: Sampling, check: Callable[[], None] | None) -> GuardedSource:
        """Start to read it."""
        return GuardedSource(self, sampling, check)


class GuardedVideo(Video):
    """A video that is decoded in another process."""

    def __init__(self, source: Sealed, sampling: Sampling) -> None:
        """sampling: what differs from the default is used in place of the session's. Raises `VideoError` for subtitles
        of another file."""
        if sampling.subtitles not in (None, AUTO):
            raise VideoError(f"subtitles can only be {AUTO!r}, the film's own: leave others out.")
        super().__init__(source, **{name: getattr(sampling, name) for name in sampling.given() if name != "fit"})

    def check(self) -> None:
        """Does nothing: the file is looked at when it is opened."""

    def open(self, sampling: Sampling, check: Callable[[], None] | None = None) -> GuardedSource:
        """Its frames. Raises `VideoError`, and what `check` raises."""
        return self.source.open(self.sampling(sampling), check)


class GuardedPicture(Picture):
    """A picture that is decoded in another process."""

    def check(self) -> None:
        """Does nothing: the file is looked at when it is opened."""

    def open(self, sampling: Sampling, check: Callable[[], None] | None = None) -> GuardedSource:
        """A source of one frame. Raises `VideoError`, and what `check` raises."""
        return self.source.open(Sampling(), check)


def guarded(shown: Shown, identity: Identity, limits: Limits) -> GuardedVideo | GuardedPicture:
    """A film of a prompt, for `VideoSession.ingest`. identity: of the file whose hash the film states."""
    sealed = Sealed(shown.film, identity, limits)
    return GuardedPicture(sealed) if shown.film.kind == "image" else GuardedVideo(sealed, shown.sampling)


class GuardedSource:
    """A `VideoSource` whose frames come from another process."""

    def __init__(self, sealed: Sealed, sampling: Sampling, check: Callable[[], None] | None = None) -> None:
        """sampling: with `fps`. check: called while waiting; may raise to stop. Raises `VideoError`."""
        self._sealed, self._sampling = sealed, replace(sampling, fit=False)
        self.name = sealed.film.name
        self._lock = threading.Lock()
        child = self._start()
        try:
            self._read_facts(child, check)
        except BaseException:
            child.close()
            raise
        self._waiting: Child | None = child
        """Has the film open, for the first that wants its frames."""
        weakref.finalize(self, child.close)
        self.damaged: tuple[tuple[float, float], ...] = ()

    def frames(self, tick: Tick | None = None, first: int = 0) -> Iterator[np.ndarray]:
        """As `VideoSource.frames`. Ends with an error if the file was written to meanwhile."""
        with self._lock:
            child, self._waiting = self._waiting, None
        try:
            if child is None:
                child = self._start()
                self._skip_facts(child, tick)
            child.ask(str(first))
            yield from self._frames(child, tick)
            os.close(open_known(self._sealed.film.path, self.name, self._sealed.identity))
        finally:
            if child is not None:
                child.close()

    def sha256(self, check: Callable[[], None] | None = None) -> str:
        """Of the file's bytes, found before; the file is checked to be the same."""
        os.close(open_known(self._sealed.film.path, self.name, self._sealed.identity))
        return self._sealed.film.sha256

    def close(self) -> None:
        """End the process that waits to be asked for frames. May be called twice."""
        with self._lock:
            child, self._waiting = self._waiting, None
        if child is not None:
            child.close()

    def _start(self) -> Child:
        film = self._sealed.film
        request = {
            "name": film.name,
            "path": str(film.path),
            "kind": film.kind,
            "sampling": asdict(self._sampling),
        }
        descriptor = open_known(film.path, film.name, self._sealed.identity)
        try:
            return Child(descriptor, request, self._sealed.limits)
        finally:
            os.close(descriptor)

    def _read_facts(self, child: Child, check: Callable[[], None] | None) -> None:
        facts = _facts(child, check)
        try:
            self.height, self.width = int(facts["height"]), int(facts["width"])
            self.fps, self.start = float(facts["fps"]), float(facts["start"])
            self.expected = int(facts["expected"])
            self.seconds: float | None = None if facts["seconds"] is None else float(facts["seconds"])
            self.cues = tuple(Cue(float(start), float(end), str(text)) for start, end, text in facts["cues"])
        except (KeyError, TypeError, ValueError):
            raise _nonsense(self.name) from None
        numbers = (self.fps, self.start, self.seconds or 0.0)
        sized = min(self.height, self.width) > 0 and self.height * self.width <= self._sealed.limits.pixels
        if not (sized and self.fps > 0 and self.expected > 0 and all(map(math.isfinite, numbers))):
            raise _nonsense(self.name)

    def _skip_facts(self, child: Child, tick: Tick | None) -> None:
        facts = _facts(child, None if tick is None else lambda: tick(0.0))
        if (facts.get("height"), facts.get("width"), facts.get("fps")) != (self.height, self.width, self.fps):
            raise changed(self.name)

    def _frames(self, child: Child, tick: Tick | None) -> Iterator[np.ndarray]:
        shape, seconds = (self.height, self.width, 3), 0.0
        last: np.ndarray | None = None

        def poke() -> None:
            if tick is not None:
                tick(seconds)

        while True:
            kind, size = child.head(poke)
            if kind == wire.TICK:
                seconds = max(seconds, _seconds(child.text(size)))
                poke()
            elif kind == wire.FRAME and size == math.prod(shape):
                last = np.empty(shape, np.uint8)
                child.fill(last.data.cast("B"), poke)
                yield last
            elif kind == wire.SAME and last is not None:
                yield last
            elif kind == wire.END:
                self.damaged = _spans(child.text(size), self.name)
                return
            else:
                raise _nonsense(self.name)


def _facts(child: Child, poke: Callable[[], None] | None) -> dict[str, Any]:
    while True:
        kind, size = child.head(poke)
        if kind == wire.TICK:
            child.text(size)
            if poke is not None:
                poke()
            continue
        try:
            facts = json.loads(child.text(size)) if kind == wire.FACTS else None
        except (ValueError, RecursionError):
            facts = None
        if not isinstance(facts, dict):
            raise _nonsense(child.name)
        return facts


def _seconds(content: bytes) -> float:
    seconds = wire.SECONDS.unpack(content)[0] if len(content) == wire.SECONDS.size else 0.0
    return seconds if math.isfinite(seconds) else 0.0


def _spans(content: bytes, name: str) -> tuple[tuple[float, float], ...]:
    try:
        return tuple((float(begin), float(end)) for begin, end in json.loads(content))
    except (TypeError, ValueError, RecursionError):
        raise _nonsense(name) from None


def _nonsense(name: str) -> VideoError:
    return VideoError(f"{name}: the decoder answered nonsense and was stopped: re-encode the file.")
