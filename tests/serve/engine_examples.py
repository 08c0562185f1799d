"""What tests of the engine share: questions about films, and what happened to a request."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tieredkv.serve.asked import Answer, Asked, Film, Piece, Progress, Shown
from tieredkv.serve.engine.engine import ModelEngine
from tieredkv.serve.settings import Settings
from tieredkv.video.media import Picture, Video
from tieredkv.video.sampling import Sampling

QUESTION = "what colour was the moon ?"
OTHER = "what colour was the cup ?"
TIERS = {"gpu_kv_gb": 0.5, "prefill_chunk": 64}


def film(path: Path) -> Film:
    return Film(path, hashlib.sha256(path.read_bytes()).hexdigest(), path.name)


def question(path: Path, prompt: str = QUESTION, **values: Any) -> Asked:
    """A question about a film; `end`: of the part that is shown, in seconds."""
    sampling = Sampling(fps=4, end=values.pop("end", None))
    options = {"max_new_tokens": 8, **values.pop("options", {})}
    return Asked((Shown(film(path), sampling),), prompt, options=options, **values)


def settings(**values: Any) -> Settings:
    return replace(Settings(tiers=dict(TIERS), max_new_tokens=8), **values)


def plain_source(shown: Shown) -> Video | Picture:
    """A film that is read in this process."""
    if shown.film.kind == "image":
        return Picture(shown.film.path)
    names = [name for name in shown.sampling.given() if name != "fit"]  # which holds for all films of a prompt
    return Video(shown.film.path, **{name: getattr(shown.sampling, name) for name in names})


class Films:
    """Gives films to an engine and lists those that are ingested; each frame waits until `gate` is open."""

    def __init__(self) -> None:
        self.ingested: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def source(self, shown: Shown) -> Video:
        video = plain_source(shown)
        opened = video.open

        def open_gated(sampling: Sampling, check: Any = None) -> Any:
            source = opened(sampling, check)
            frames = source.frames

            def gated(tick: Any = None, first: int = 0) -> Iterator[Any]:
                self.ingested.append(shown.film.path.name)
                for frame in frames(tick, first):
                    while not self.gate.wait(0.01):
                        tick(0.0)  # raises if the ingest was stopped
                    yield frame

            source.frames = gated
            return source

        video.open = open_gated
        return video


class Running:
    """A started engine."""

    def __init__(self, model: Any, processor: Any, films: Films | None = None, **values: Any) -> None:
        source = plain_source if films is None else films.source
        self.engine = ModelEngine(model, processor, settings(**values), source)

    async def __aenter__(self) -> ModelEngine:
        await self.engine.start()
        return self.engine

    async def __aexit__(self, *exc: object) -> None:
        await self.engine.stop(0)


async def all_of(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]


async def answer_of(events: AsyncIterator[Any]) -> Answer:
    """The last event of a question, whose pieces are its text."""
    seen = await all_of(events)
    last = seen[-1]
    assert isinstance(last, Answer)
    assert "".join(event.text for event in seen if isinstance(event, Piece)) == last.generation.text
    return last


async def until(events: AsyncIterator[Any], kind: type, stage: str | None = None) -> Any:
    """The first event of a kind, and if it is progress of a stage."""
    async for event in events:
        if isinstance(event, kind) and (stage is None or (isinstance(event, Progress) and event.stage == stage)):
            return event
    raise AssertionError(f"no {kind.__name__} came")


async def eventually(condition: Any) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)
