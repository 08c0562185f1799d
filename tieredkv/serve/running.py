"""Runs the server: loads the model, joins the parts, and ends as the signals say."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import uvicorn

from tieredkv.errors import OptionError
from tieredkv.models.loading import load
from tieredkv.progress import tell
from tieredkv.serve import logs
from tieredkv.serve.address import url
from tieredkv.serve.app import create_app
from tieredkv.serve.demo_film import add_demo
from tieredkv.serve.engine.engine import ModelEngine
from tieredkv.serve.media.library import Library
from tieredkv.serve.settings import Settings
from tieredkv.session.default_cap import check_weights_fit
from tieredkv.tiny import model as tiny

LAST_REPLIES_S = 2.0
"""Time for the last bytes of replies, after the engine has stopped."""
BACKLOG = 2048
"""Connections that wait to be accepted."""


class _Server(uvicorn.Server):
    """uvicorn without handlers of signals: `_Stopping` decides what they do."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Stopping:
    """The first signal refuses new requests and gives those that run a time of grace; the second ends them at once."""

    def __init__(self, stop: Callable[[float], Any], grace: float, server: _Server) -> None:
        self._stop, self._grace, self._server = stop, grace, server
        self._tasks: list[asyncio.Task[None]] = []
        self.first: signal.Signals | None = None

    def install(self) -> None:
        """Handle the signals from now on."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received, number)

    def _received(self, number: signal.Signals) -> None:
        if self.first is None:
            self.first = number
            self._tasks.append(asyncio.create_task(self._end(self._grace)))
            # Last: whoever read stderr may be gone, and the server must still end.
            tell(f"stopping: what runs may go on for {self._grace:g} s; once more stops it at once.")
        elif len(self._tasks) == 1:
            self._tasks.append(asyncio.create_task(self._end(0.0)))

    async def _end(self, grace: float) -> None:
        await self._stop(grace)
        self._server.should_exit = True


def run(settings: Settings, listener: socket.socket, log_level: str) -> int:
    """Serve until a signal arrives; returns the exit code. Raises a `TieredKVError` for a model that does not load.

    settings: checked. listener: bound to the address.
    """
    logs.start(log_level, settings.api_keys)
    toy = settings.model is None
    if toy:
        tell("no -m: the bundled toy model answers, which knows only the films of `tieredkv demo`.")
        settings = replace(settings, fps=settings.fps or tiny.FPS)
    else:
        tell(f"loading {settings.model}")
    model, processor = load(settings.model or tiny.PATH, None, settings.weights, check_weights_fit)
    return asyncio.run(_serve(settings, listener, model, processor, toy))


async def _serve(settings: Settings, listener: socket.socket, model: Any, processor: Any, toy: bool) -> int:
    library = Library(settings)
    engine = ModelEngine(model, processor, settings, library.source)
    app = create_app(settings, engine, library)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        backlog=BACKLOG,
        timeout_graceful_shutdown=int(LAST_REPLIES_S),
    )
    server = _Server(config)
    stopping = _Stopping(engine.stop, settings.grace, server)
    stopping.install()
    await library.open()
    try:
        if toy:
            app.state.demo = await asyncio.to_thread(add_demo, library)
        await engine.start()
        try:
            listener.listen(BACKLOG)
        except OSError as error:  # taken since
            raise OptionError(f"{url(settings.host, listener)} cannot be served: {error.strerror}.") from None
        tell(f"ready: {url(settings.host, listener)}")
        await server.serve(sockets=[listener])
    finally:
        if stopping.first is None:
            await engine.stop(0.0)
        await library.close()
    return 130 if stopping.first is signal.SIGINT else 0
