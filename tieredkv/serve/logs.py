"""What the server logs: a line for each request, and nothing that is secret."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
LEVELS = ("debug", "info", "warning", "error")
log = logging.getLogger("tieredkv.serve")
_SECRETS = (
    (re.compile(r"data:[\w.+/;=-]*,[^\s\"'\\)>\]]*", re.IGNORECASE), "data:..."),
    (re.compile(r"\b(bearer|basic)\s+[^\s\"',}]+", re.IGNORECASE), r"\1 ..."),
    (re.compile(r"(https?://)[^\s/@\"']+@", re.IGNORECASE), r"\1...@"),
    (re.compile(r"(https?://[^\s?#\"']+)[?#][^\s\"'\\)>\]]*", re.IGNORECASE), r"\1?..."),
)
"""Films in URLs, credentials, and queries of URLs, which may be signatures."""


class Redacted(logging.Formatter):
    """Lines without what is secret, tracebacks too."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._keys = tuple(keys)

    def format(self, record: logging.LogRecord) -> str:
        """As `logging.Formatter` does, then redacted."""
        text = super().format(record)
        for key in self._keys:
            text = text.replace(key, "...")
        for pattern, shown in _SECRETS:
            text = pattern.sub(shown, text)
        return text


def start(level: str, keys: Iterable[str]) -> None:
    """Write this package's and uvicorn's lines to stderr from now on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Redacted(keys))
    for name in ("tieredkv", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    if level == "info":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its steps of starting and stopping


Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Observer = Callable[[str, str, int, float], None]
"""Called with method, route, status and seconds of a request. The route is a pattern, such as `/v1/files/{id}`."""

WENT_AWAY = 499
"""Logged for a client that left before there was a reply, as nginx does."""


class Requests:
    """ASGI middleware that logs each request without its query, and reports it to an observer."""

    def __init__(self, app: Any, observer: Observer) -> None:
        self._app, self._observer = app, observer

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), WENT_AWAY

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except Exception:
            status = 500  # sent by the application's outermost layer, and logged by uvicorn
            raise
        finally:
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path", "other")
            # As it was sent: decoded, it might contain line breaks.
            path = scope.get("raw_path", b"").partition(b"?")[0].decode("ascii", "replace")[:200]
            log.info("%s %s %d %.3f s", scope["method"], path, status, seconds)
            self._observer(scope["method"], route, status, seconds)
