"""The web application: which routes there are, which limits hold before any of them, and how errors look."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI

from tieredkv.serve import health, metrics, security
from tieredkv.serve.asked import Engine
from tieredkv.serve.json_limits import JsonLimits
from tieredkv.serve.logs import Requests
from tieredkv.serve.media import routes as files
from tieredkv.serve.metrics import Metrics
from tieredkv.serve.page import routes as page
from tieredkv.serve.protocol import chat, errors, ingest, models, responses
from tieredkv.serve.protocol.conversations import Conversations
from tieredkv.serve.settings import Settings

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

ROUTERS = (
    models.router,
    chat.router,
    responses.router,
    ingest.router,
    files.router,
    page.router,
    health.router,
    metrics.router,
    security.router,
)
"""What the server answers to. The first route that matches a path serves it."""


def create_app(settings: Settings, engine: Engine, library: Any, lifespan: Lifespan | None = None) -> FastAPI:
    """The application. Its routes find `settings`, `engine`, `library`, `conversations`, `keys` and `metrics` in
    `request.app.state`, and who asks in `request.state.client`.

    lifespan: starts the engine and the library, and stops them; None: both are running already.
    """
    app = FastAPI(title="tieredkv", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.settings, app.state.engine, app.state.library = settings, engine, library
    app.state.conversations = Conversations()
    app.state.keys, app.state.metrics = security.Keys(settings.api_keys), Metrics(engine)
    for router in ROUTERS:
        app.include_router(router)
    errors.install(app)
    # The last one added sees a request first.
    app.add_middleware(JsonLimits, most_bytes=int(settings.body_mb * 2**20))
    app.add_middleware(security.Gate, settings=settings, keys=app.state.keys)
    app.add_middleware(Requests, observer=app.state.metrics.requested)
    return app
