"""Parts of a server without a model: an engine that says what it was told to, and films that are only names."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

pytest.importorskip("fastapi")

import uvicorn
from fastapi import FastAPI

from tieredkv.evidence.moments import Evidence, Moment
from tieredkv.serve.asked import Answer, Asked, Film, Piece, Progress, Ready
from tieredkv.serve.engine.sessions import Tier
from tieredkv.serve.engine.state import Counts, EngineState
from tieredkv.serve.errors import ApiError
from tieredkv.session.results import Generation, Stats


def some_stats(**values: Any) -> Stats:
    """Statistics of an answer: zeros, but for what is given."""
    kinds = get_type_hints(Stats)
    zeros: dict[Any, Any] = {str: "eager", tuple[tuple[float, float], ...]: ()}
    return Stats(**{field.name: zeros.get(kinds[field.name], 0) for field in fields(Stats)} | values)


def an_answer(text: str, *, reused: bool = True, finish: Any = "stop", tokens: Any = None, **stats: Any) -> Answer:
    """The last event of a question answered with `text`, which looked at seconds 2 to 4."""
    import torch

    moments = (Moment(2.0, 4.0, 0.75, 3.0),)
    evidence = Evidence(moments, torch.tensor([0.25, 0.75]), 0.0, 4.0, 2.0, source="film.mp4")
    values = {"prompt_tokens": 1000, "visual_tokens": 960, "new_tokens": max(1, len(text.split())), **stats}
    ids = list(range(values["new_tokens"]))
    return Answer(Generation(text, ids, some_stats(**values), evidence=evidence), finish, reused, tokens)


def an_exchange(*pieces: str, **values: Any) -> list[Any]:
    """Everything that happens when `pieces` are the answer."""
    return [Progress("queued"), Progress("question", 0, 40), *map(Piece, pieces), an_answer("".join(pieces), **values)]


Event = Progress | Piece | Answer | Ready | BaseException | asyncio.Event | float


class FakeEngine:
    """Plays a script of events. An error among them is raised there, an `asyncio.Event` waited for, and a number is
    seconds to wait."""

    model_name = "fake/model"
    created = 1_700_000_000

    def __init__(self) -> None:
        self.observers: list[Any] = []
        self.state = EngineState(0, 0, False, Counts(), *(Tier(0, 0, 0) for _ in range(3)))
        self.script: list[Any] = an_exchange("A red ", "circle.")
        self.preparation: list[Any] = [Progress("ingest", 400, 960), Ready(False, 960, 16.0)]
        self.asked: list[Asked] = []
        self.prepared: list[Asked] = []
        self.closed = 0
        """How many of its iterators have ended, in whatever way."""
        self.stopped = 0
        """How many of them before their last event."""

    def snapshot(self) -> EngineState:
        return self.state

    def ask(self, asked: Asked) -> AsyncIterator[Any]:
        self.asked.append(asked)
        return self._play(self.script)

    def prepare(self, asked: Asked) -> AsyncIterator[Any]:
        self.prepared.append(asked)
        return self._play(self.preparation)

    async def _play(self, script: list[Any]) -> AsyncIterator[Any]:
        done = False
        try:
            for event in list(script):
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, asyncio.Event):
                    await event.wait()
                elif isinstance(event, float):
                    await asyncio.sleep(event)
                else:
                    await asyncio.sleep(0)
                    yield event
            done = True
        finally:
            self.closed += 1
            self.stopped += not done


class FakeLibrary:
    """Films of any URL that does not say `missing`, whose bytes are their URL."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requested: list[tuple[str | None, str | None, str]] = []
        self.known: dict[tuple[str, str], Film] = {}
        self.pinned: list[Film] = []

    async def film(self, *, url: str | None, uuid: str | None = None, kind: Any = "video", client: str = "") -> Film:
        self.requested.append((url, uuid, kind))
        if url is None and uuid is not None and (client, uuid) in self.known:
            return self.known[client, uuid]
        if url is None or "missing" in url:
            raise ApiError(404, f"there is no film {url or uuid!r}: upload it.", code="no_film")
        film = Film(self.folder / "film.mp4", hashlib.sha256(url.encode()).hexdigest(), url.rsplit("/", 1)[-1], kind)
        if uuid is not None:
            self.known[client, uuid] = film
        return film

    @contextmanager
    def pin(self, film: Film) -> Iterator[None]:
        self.pinned.append(film)
        try:
            yield
        finally:
            self.pinned.remove(film)


@dataclass
class Listening:
    """A server that listens on a port of this machine, in a thread of its own."""

    url: str
    app: FastAPI
    engine: FakeEngine
    library: FakeLibrary


@contextmanager
def listening_server(app: FastAPI) -> Iterator[str]:
    """Serves an application; gives its URL."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether something becomes true soon, in another thread."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()
