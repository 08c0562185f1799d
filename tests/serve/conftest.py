"""Fixtures of a server without a model: see `serve_fakes`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import httpx
from fastapi import FastAPI
from serve_fakes import FakeEngine, FakeLibrary, Listening, an_exchange, listening_server

from tieredkv.serve.app import create_app
from tieredkv.serve.settings import Settings


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def library(tmp_path: Path) -> FakeLibrary:
    return FakeLibrary(tmp_path)


@pytest.fixture
def settings() -> Settings:
    return Settings()


@pytest.fixture
def app(settings: Settings, engine: FakeEngine, library: FakeLibrary) -> FastAPI:
    """A server of the fakes. A test file may override `settings`, `engine` and `library`."""
    return create_app(settings, engine, library)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Requests to `app` without a socket. Streams arrive whole: use a server that listens to see them arrive."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as connected:
        yield connected


@pytest.fixture(scope="session")
def _one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listening]:
    engine, library = FakeEngine(), FakeLibrary(tmp_path_factory.mktemp("films"))
    app = create_app(Settings(), engine, library)
    with listening_server(app) as url:
        yield Listening(url, app, engine, library)


@pytest.fixture
def listening(_one_server: Listening) -> Listening:
    """One server for all tests, as if nobody had asked it anything."""
    _one_server.engine.__init__()  # type: ignore[misc]
    _one_server.library.requested.clear()
    return _one_server


@pytest.fixture
async def two_clients(
    engine: FakeEngine, library: FakeLibrary
) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """Two clients of one server, each with a key of its own."""
    keys = ("key-of-the-first", "key-of-the-second")
    transport = httpx.ASGITransport(create_app(Settings(api_keys=keys), engine, library), raise_app_exceptions=False)
    first, second = (
        httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:8000", headers={"Authorization": f"Bearer {key}"}
        )
        for key in keys
    )
    async with first, second:
        yield first, second


@pytest.fixture
def answers(engine: FakeEngine) -> Callable[..., None]:
    """`answers("A ", "cat.")`: what the engine says from now on."""

    def say(*pieces: str, **values: Any) -> None:
        engine.script = an_exchange(*pieces, **values)

    return say


@pytest.fixture(scope="session")
def toy() -> tuple[Any, Any]:
    """The bundled model and its processor."""
    from tieredkv.models.loading import load
    from tieredkv.tiny.model import PATH

    return load(str(PATH), None)
