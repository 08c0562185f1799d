"""What tests of the engine share: questions about films, and what happened to a request."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tieredkv.serve.asked import Answer, Asked, Film, Piece, Progress, Ready, Shown
from tieredkv.serve.engine.engine import ModelEngine
from tieredkv.serve.settings import Settings
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


class Running:
    """A started engine."""

    def __init__(self, model: Any, processor: Any, **values: Any) -> None:
        self.engine = ModelEngine(model, processor, settings(**values))

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


__all__ = ["OTHER", "QUESTION", "Ready", "Running", "all_of", "answer_of", "eventually", "film", "question", "until"]
