"""Who may ask: the checks of every request before any route sees it, and the headers of every reply."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from tieredkv.serve.errors import ApiError
from tieredkv.serve.settings import LOOPBACK, Settings, is_address

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

COOKIE = "tieredkv"
COOKIE_S = 12 * 3600
"""Seconds that a login lasts, unless the server is restarted."""
READING = ("GET", "HEAD")
OPEN = ("/", "/health")
"""What needs no key; so do the files of the page. They hold nothing of anybody's."""
OPEN_FOLDER = "/page/"
FORM_PATH = "/v1/files"
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cache-control": b"no-store",
}
"""Of every reply that does not say otherwise."""


class Keys:
    """The API keys, and the logins of browsers that showed one. Keeps digests, not keys."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]
        self._secret = secrets.token_bytes(32)
        """Of this process: a restart ends all logins."""

    @property
    def needed(self) -> bool:
        """Whether the server has any."""
        return bool(self._digests)

    def client(self, key: str) -> str | None:
        """A name for the client with this key; None if it is wrong. Takes as long for any wrong key."""
        found, given = None, _digest(key)
        for digest in self._digests:
            if hmac.compare_digest(digest, given):
                found = f"key-{digest.hex()[:12]}"
        return found

    def login(self, client: str, now: float | None = None) -> str:
        """The value of a cookie that stands for a client's key."""
        text = f"{client}.{int(time.time() if now is None else now) + COOKIE_S}"
        return f"{text}.{self._mac(text)}"

    def of_login(self, cookie: str, now: float | None = None) -> str | None:
        """The client of a cookie; None if it is forged or over."""
        text, _, mac = cookie.rpartition(".")
        client, _, until = text.rpartition(".")
        if not hmac.compare_digest(self._mac(text).encode(), mac.encode()):
            return None
        return client if int(until) > (time.time() if now is None else now) else None

    def _mac(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


class Gate:
    """ASGI middleware. Refuses a request for another host than this, a write that a page of another site sends, a body
    of the wrong kind, and, if there are keys, a request without one. Who asks is in `request.state.client`."""

    def __init__(self, app: Any, settings: Settings, keys: Keys) -> None:
        self._app, self._keys = app, keys
        self._hosts = {name.lower() for name in (*LOOPBACK, settings.host, *settings.allowed_hosts)}

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # there are no websockets: uvicorn refuses them
        guarded = _with_headers(send)
        try:
            self._check(scope)
        except ApiError as error:
            # Its body is not read, so the connection cannot serve another request.
            headers = {**error.headers(), "Connection": "close"}
            await JSONResponse(error.body(), error.status, headers)(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)

    def _check(self, scope: Any) -> None:
        """Raise `ApiError` unless the request may go on."""
        headers = _Headers(scope["headers"])
        host = headers.one("host")
        self._check_host(host)
        if scope["method"] not in READING:
            check_origin(headers, host or "")
            check_type(headers, scope["path"])
        peer = scope.get("client")
        client = self._who(scope, headers) if self._keys.needed else None
        scope.setdefault("state", {})["client"] = client or (peer[0] if peer else "")

    def _check_host(self, host: str | None) -> None:
        """A page whose name an attacker resolves to this machine would come with that name. An address has none."""
        name = host_name(host) if host is not None else ""
        if name.lower().rstrip(".") not in self._hosts and not is_address(name):
            raise ApiError(
                400,
                f"this server is not called {name[:80]!r}: use its address, or start it with --allowed-host.",
                code="wrong_host",
            )

    def _who(self, scope: Any, headers: _Headers) -> str | None:
        """The client with a valid key. Raises `ApiError` 401 if there must be one."""
        path = scope["path"]
        is_open = scope["method"] in READING and (path in OPEN or path.startswith(OPEN_FOLDER))
        scheme, _, key = (headers.one("authorization") or "").partition(" ")
        client = self._keys.client(key.strip()) if scheme.lower() == "bearer" else None
        if client is None and scope["method"] in READING and not scheme:
            client = self._keys.of_login(_cookie(headers))
        if client is None and not is_open:
            wrong = "the API key is not one of this server's" if scheme else "this server needs an API key"
            raise ApiError(
                401,
                f"{wrong}: send it as Authorization: Bearer KEY.",
                code="invalid_api_key" if scheme else "no_api_key",
            )
        return client


class _Headers:
    """Of a request, by lower-case name."""

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self._raw = list(raw)

    def one(self, name: str) -> str | None:
        """The only value of a header. Raises `ApiError` if there are several."""
        values = [value for key, value in self._raw if key == name.encode()]
        if len(values) > 1:
            raise ApiError(400, f"the request has {len(values)} headers {name}: send one.", code="bad_header")
        return values[0].decode("latin-1").strip() if values else None


def host_name(host: str) -> str:
    """A Host header without its port, and without the brackets of an IPv6 address."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def check_origin(headers: _Headers, host: str) -> None:
    """Raise `ApiError` for a request that a browser sends for a page of another origin. Other clients send none of
    these headers. The scheme is not compared: a proxy may speak TLS for this server."""
    origin = headers.one("origin")
    _, slashes, place = (origin or "").partition("://")
    other = origin is not None and (not slashes or place.lower() != host.lower())
    if other or headers.one("sec-fetch-site") in ("cross-site", "same-site"):
        raise ApiError(
            403, "a page of another site may not use this server: open the server's own page.", code="other_origin"
        )


def check_type(headers: _Headers, path: str) -> None:
    """Raise `ApiError` unless a body is said to be what the path takes: no page can send JSON elsewhere unasked."""
    stated = (headers.one("content-type") or "").partition(";")[0].strip().lower()
    if headers.one("transfer-encoding") is None and (headers.one("content-length") or "0") == "0":
        return
    wanted = "multipart/form-data" if path == FORM_PATH else "application/json"
    if stated != wanted:
        raise ApiError(
            415, f"the body is {stated[:80] or 'of no stated type'}: send Content-Type: {wanted}.", code="wrong_type"
        )


def _cookie(headers: _Headers) -> str:
    """Of this server; "" without one. `SimpleCookie` would read none after one that breaks the rules, and a browser
    sends the cookies of all servers of this machine."""
    cookies = (part.strip().partition("=") for part in (headers.one("cookie") or "").split(";"))
    return {name: value for name, _, value in cookies}.get(COOKIE, "")


def _with_headers(send: Send) -> Send:
    """`send`, which adds what the reply lacks of `HEADERS`."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            present = {name.lower() for name, _ in message.get("headers", ())}
            added = [(name, value) for name, value in HEADERS.items() if name not in present]
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return sent


router = APIRouter()


@router.post("/v1/tieredkv/login", status_code=204)
async def login(request: Request) -> Response:
    """Give a browser that sent a key a cookie, by which its films and pictures load. It is good for reading only."""
    response = Response(status_code=204)
    keys: Keys = request.app.state.keys
    if keys.needed:
        response.set_cookie(
            COOKIE,
            keys.login(request.state.client),
            max_age=COOKIE_S,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
    return response
