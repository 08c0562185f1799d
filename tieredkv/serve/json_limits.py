"""Limits on JSON in requests: its size and depth are checked before anything parses it."""

from __future__ import annotations

import json
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
MOST_MARKS = 500_000
"""These, their ends, texts and commas: parsing many small values would hold up all other requests."""
TOGETHER = 8
"""Bodies of the largest size that may be in memory at once."""

# Possessive: never goes back, so that no text makes it slow.
_MARKS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\Z)|[\[{]|[\]}]|,|NaN|Infinity', re.DOTALL)
_HALF_CHARACTERS = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
"""Where a character may be given as two halves; one alone cannot be written out again."""


def check_json(body: bytes) -> None:
    """Raise `ApiError` for JSON that is no JSON of the web, or with more, or more deeply nested, objects and arrays
    than allowed. What is not JSON at all is left to the parser."""
    if b"\0" in body:  # UTF-16 and UTF-32 have it in every bracket
        raise ApiError(400, "the body is not UTF-8 text: send JSON in UTF-8.", code="bad_json")
    depth = nodes = 0
    for marks, match in enumerate(_MARKS.finditer(body)):
        first = body[match.start()]
        if marks >= MOST_MARKS:
            raise ApiError(
                400, f"the JSON has more than {MOST_MARKS // 2:,} values: send fewer.", code="too_many_values"
            )
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
        elif first in b"NI":
            raise ApiError(
                400, "the JSON has NaN or Infinity in it, which are no numbers: leave them out.", code="bad_json"
            )
    if _HALF_CHARACTERS.search(body):
        _check_characters(body)


def _check_characters(body: bytes) -> None:
    try:
        value = json.loads(body)
    except ValueError:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the JSON has half a character in a text: send whole ones.", code="bad_json") from None


class JsonLimits:
    """Reads the body of every request that is not a form, and refuses what is over the limits.

    A form is not read here: uploads are larger than memory, and their route limits them.
    """

    def __init__(self, app: Any, most_bytes: int) -> None:
        self._app, self._most, self._held = app, most_bytes, 0

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS") or _is_form(scope):
            await self._app(scope, receive, send)
            return
        body = _Body()
        try:
            await self._serve(scope, receive, send, body)
        finally:
            self._held -= body.size

    async def _serve(self, scope: Any, receive: Receive, send: Send, body: _Body) -> None:
        try:
            if not await self._read(scope, receive, body):
                return
            check_json(body.whole())
        except ApiError as error:
            # What is left of the body is not read: the connection cannot serve another request.
            headers = {**error.headers(), "Connection": "close"}
            await JSONResponse(error.body(), error.status, headers)(scope, receive, send)
            return
        await self._app(scope, _replay(body.whole(), receive), send)

    async def _read(self, scope: Any, receive: Receive, body: _Body) -> bool:
        """Read the whole body; False if the client went away meanwhile."""
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated[:20]) > self._most:
            raise self._too_large()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            part = message.get("body", b"")
            body.add(part)
            self._held += len(part)
            if body.size > self._most:
                raise self._too_large()
            if self._held > TOGETHER * self._most:
                raise ApiError(
                    429, "the server is reading other large requests: try again soon.", code="busy", retry_after=5
                )
            if not message.get("more_body", False):
                return True

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request is larger than {self._most / 2**20:g} MiB: upload films first, with POST /v1/files.",
            code="too_large",
        )


class _Body:
    """The body of one request, as it arrives."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.size = 0

    def add(self, part: bytes) -> None:
        self._parts.append(part)
        self.size += len(part)

    def whole(self) -> bytes:
        if len(self._parts) != 1:
            self._parts = [b"".join(self._parts)]
        return self._parts[0]


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
