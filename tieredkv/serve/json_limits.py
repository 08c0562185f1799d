"""Limits on JSON in requests: its size and depth are checked before anything parses it."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from tieredkv.serve.errors import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MOST_DEPTH = 32
"""Objects and arrays inside each other. A question needs seven."""
MOST_NODES = 100_000
"""Objects and arrays altogether: what they take parsed is many times what they take as text."""

# Possessive: never goes back, so that no text makes it slow.
_BRACKETS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\Z)|[\[{]|[\]}]', re.DOTALL)


def check_nesting(body: bytes) -> None:
    """Raise `ApiError` for JSON with more, or more deeply nested, objects and arrays than allowed. Others are left to
    the parser."""
    depth = nodes = 0
    for match in _BRACKETS.finditer(body):
        first = body[match.start()]
        if first in b"[{":
            depth, nodes = depth + 1, nodes + 1
            if depth > MOST_DEPTH:
                raise ApiError(
                    400, f"the JSON is nested more than {MOST_DEPTH} deep: send a flatter one.", code="too_deep"
                )
            if nodes > MOST_NODES:
                raise ApiError(
                    400,
                    f"the JSON has more than {MOST_NODES:,} objects and arrays: send fewer.",
                    code="too_many_values",
                )
        elif first in b"]}":
            depth -= 1


class JsonLimits:
    """Reads the body of every request that is not a form, and refuses what is over the limits.

    A form is not read here: uploads are larger than memory, and their route limits them.
    """

    def __init__(self, app: Any, most_bytes: int) -> None:
        self._app, self._most = app, most_bytes

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS") or _is_form(scope):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
            if body is None:
                return
            check_nesting(body)
        except ApiError as error:
            # What is left of the body is not read: the connection cannot serve another request.
            headers = {**error.headers(), "Connection": "close"}
            await JSONResponse(error.body(), error.status, headers)(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Any, receive: Receive) -> bytes | None:
        """The whole body; None if the client went away meanwhile."""
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > self._most:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._most:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request is larger than {self._most / 2**20:g} MiB: upload films first, with POST /v1/files.",
            code="too_large",
        )


def _is_form(scope: Any) -> bool:
    return dict(scope["headers"]).get(b"content-type", b"").lower().startswith(b"multipart/form-data")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, and then what the connection reports."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
