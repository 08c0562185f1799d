"""http(s) URLs: downloaded from hosts that are allowed, and kept as long as the server they come from says the same."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import unquote, urlsplit

import httpx

from tieredkv.errors import VideoError
from tieredkv.serve.errors import ApiError
from tieredkv.serve.media.connect import NotPublic, PublicTransport, timeouts
from tieredkv.serve.media.entry import Entry
from tieredkv.serve.media.store import Store
from tieredkv.serve.media.threads import finished
from tieredkv.video.playlists import names_others
from tieredkv.video.urls import public_name

_MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_IDLE_S = 30.0
"""Seconds without a byte after which a download is given up."""
_TOTAL_S = 1800.0
"""Seconds that one may take."""
_FRESH_S = 600.0
"""Seconds for which a film is kept without asking where its server gives it no version."""
_MOST_KNOWN = 1000
"""URLs that are remembered."""
_LONGEST_URL = 8192
_BLOCK = 2**20
_TEXT = ("text/", "application/xhtml", "application/vnd.apple.mpegurl", "application/x-mpegurl", "application/dash+xml")
"""How the types of web pages and playlists begin."""


@dataclass(slots=True)
class _Known:
    """A URL that was downloaded."""

    entry: str
    """Id in the store."""
    etag: str | None
    modified: str | None
    since: float


class Fetcher:
    """Downloads films, each URL once. On the event loop."""

    def __init__(
        self,
        store: Store,
        hosts: tuple[str, ...],
        any_host: bool,
        transport: Callable[[], httpx.AsyncBaseTransport] = PublicTransport,
        idle_s: float = _IDLE_S,
        total_s: float = _TOTAL_S,
    ) -> None:
        """hosts: from which to fetch: "example.org", "*.example.org" for all below it, with ":8080" another port than
        those of http and https. any_host: from all others too. transport: for tests."""
        self._store, self._any, self._transport = store, any_host, transport
        self._hosts = frozenset(host.lower().rstrip(".") for host in hosts)
        self._idle_s, self._total_s = idle_s, total_s
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._locks: dict[str, asyncio.Lock] = {}

    async def fetch(self, url: str) -> Entry:
        """The film at a URL. Raises `ApiError`, whose message names the URL without its query and its user."""
        name = self._name(url)
        self._check(url, name)
        lock = self._locks.setdefault(url, asyncio.Lock())
        try:
            async with lock:
                try:
                    async with asyncio.timeout(self._total_s):
                        return await self._fetch(url, name)
                except NotPublic:
                    self._refuse(f"{name}: its host has no public address: upload the film instead.", "host_refused")
                except TimeoutError:
                    raise _failed(name, f"the download takes more than {self._total_s:g} s") from None
                except httpx.TimeoutException:
                    raise _failed(name, f"nothing came for {self._idle_s:g} s") from None
                except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
                    raise _failed(name, type(error).__name__) from None
        finally:
            if not lock.locked():
                self._locks.pop(url, None)

    async def _fetch(self, url: str, name: str) -> Entry:
        known = self._known.get(url)
        entry = None if known is None else self._store.find(known.entry)
        headers = {"User-Agent": "tieredkv", "Accept": "video/*,image/*,*/*;q=0.1", "Accept-Encoding": "identity"}
        if known is not None and entry is not None:
            if not (known.etag or known.modified) and time.monotonic() < known.since + _FRESH_S:
                return entry
            headers |= {"If-None-Match": known.etag} if known.etag else {}
            headers |= {"If-Modified-Since": known.modified} if known.modified else {}
        transport = self._transport()
        try:
            response = await self._follow(transport, url, name, headers)
            try:
                if response.status_code == 304 and entry is not None:
                    return entry
                kept = await self._download(response, name)
            finally:
                await response.aclose()
        finally:
            await transport.aclose()
        etag, modified = response.headers.get("ETag"), response.headers.get("Last-Modified")
        self._known[url] = _Known(kept.id, etag, modified, time.monotonic())
        self._known.move_to_end(url)
        while len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)
        return kept

    async def _follow(
        self, transport: httpx.AsyncBaseTransport, url: str, name: str, headers: dict[str, str]
    ) -> httpx.Response:
        """The answer at the end of the redirects, each of which is checked like the URL itself."""
        for _ in range(_MOST_REDIRECTS + 1):
            request = httpx.Request("GET", url, headers=headers, extensions=timeouts(self._idle_s))
            response = await transport.handle_async_request(request)
            response.request = request
            if response.status_code not in _REDIRECTS:
                return response
            await response.aclose()
            url = str(request.url.join(response.headers.get("Location", "")))
            self._check(url, f"{name} leads to another URL, which is refused: {self._name(url)}")
        raise _failed(name, f"more than {_MOST_REDIRECTS} redirects")

    async def _download(self, response: httpx.Response, name: str) -> Entry:
        status, headers = response.status_code, response.headers
        if status != 200:
            raise _failed(name, f"its server answers {status}")
        if headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
            raise _failed(name, "it is sent compressed, although that was not asked for")
        if headers.get("Content-Type", "").lower().startswith(_TEXT):
            raise _page(name)
        stated = headers.get("Content-Length", "")
        if stated.isdecimal() and int(stated[:20]) > self._store.film_bytes:
            most = self._store.film_bytes / 2**30
            raise ApiError(413, f"{name}: larger than the {most:g} GiB that a film may have.", code="file_too_large")
        with ExitStack() as stack:
            file_name = unquote(urlsplit(str(response.request.url)).path)
            writer = await finished(lambda: stack.enter_context(self._store.writing(file_name)))
            writer.name = name
            async for block in response.aiter_raw(_BLOCK):
                if not writer.size and names_others(block):
                    raise _page(name)
                await finished(lambda block=block: writer.write(block))  # type: ignore[misc]
            if stated.isdecimal() and writer.size != int(stated[:20]):
                raise _failed(name, f"it ended after {writer.size:,} of {stated} bytes")
            return writer.keep(listed=False)

    def _name(self, url: str) -> str:
        try:
            return public_name(url)
        except VideoError:
            self._refuse("this is not a URL: write https://host/path.", "invalid_url", 400)

    def _check(self, url: str, name: str) -> None:
        """Raise `ApiError` unless the URL may be fetched, as far as that can be seen of it."""
        try:
            parts = httpx.URL(url)  # what connects must read the URL in the same way
        except httpx.InvalidURL:
            self._refuse(f"{name}: this is not a URL: write https://host/path.", "invalid_url", 400)
        scheme, host = parts.scheme, parts.raw_host.decode("ascii", "replace").lower().strip("[]").rstrip(".")
        if scheme not in ("http", "https") or not host or len(url) > _LONGEST_URL:
            self._refuse(f"{name}: only http and https URLs are fetched.", "invalid_url", 400)
        if parts.userinfo:
            self._refuse(
                f"{name}: a URL with a user or a password is not fetched: upload the film.", "invalid_url", 400
            )
        port = parts.port or (443 if scheme == "https" else 80)
        usual = port in (80, 443)
        below = {f"*.{host[at + 1 :]}" for at, letter in enumerate(host) if letter == "."}
        names = {f"{each}:{port}" for each in {host, *below}} | ({host, *below} if usual else set())
        if names & self._hosts or (self._any and usual):
            return
        if self._any:
            self._refuse(
                f"{name}: a port other than 80 and 443 is fetched from only if --fetch-from names it, as in "
                f"{host}:{port}: upload the film instead.",
                "host_refused",
            )
        self._refuse(f"{name}: this server does not fetch from {host}: upload the film instead.", "host_refused")

    def _refuse(self, message: str, code: str, status: int = 403) -> NoReturn:
        raise ApiError(status, message, code=code, param="url") from None


def _failed(name: str, why: str) -> ApiError:
    return ApiError(
        400, f"{name}: cannot be fetched ({why}): try again, or upload it.", code="fetch_failed", param="url"
    )


def _page(name: str) -> ApiError:
    message = f"{name}: not a film but a web page or a playlist: give the URL of the file."
    return ApiError(400, message, code="not_a_film", param="url")
