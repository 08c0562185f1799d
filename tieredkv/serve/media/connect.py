"""HTTP to public addresses only: a name is resolved once, checked, and that very address is connected to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from tieredkv.serve.media.addresses import is_public, own_addresses

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Addresses of a host and a port."""


class NotPublic(Exception):
    """The host has an address that is not to be fetched from. Its text says nothing about the network here."""


async def resolve(host: str, port: int) -> list[str]:
    """By the system. Raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def permitted(address: str) -> bool:
    """Whether a server may fetch from this address."""
    return is_public(address) and address not in own_addresses()


class PublicTransport(httpx.AsyncBaseTransport):
    """Sends each request to an address that was checked. Used without `httpx.Client`, it follows no redirect, knows no
    cookie and no proxy, and logs no URL. One for each download, so that no connection is used for another host."""

    def __init__(self, resolve: Resolve = resolve, permitted: Callable[[str], bool] = permitted) -> None:
        self._resolve, self._permitted = resolve, permitted
        self._inner = httpx.AsyncHTTPTransport(
            verify=httpx.create_ssl_context(trust_env=False),
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Raises `NotPublic`, `OSError` or `httpx.HTTPError`."""
        host = request.url.raw_host.decode("ascii").strip("[]")
        port = request.url.port or (443 if request.url.scheme == "https" else 80)
        addresses = await self._resolve(host, port)
        if not addresses or not all(map(self._permitted, addresses)):  # one bad address among good ones is a trick
            raise NotPublic(host)
        failure: Exception = OSError("no address")
        for address in addresses[:4]:
            direct = httpx.Request(
                request.method,
                request.url.copy_with(host=address),
                headers=request.headers,  # `Host` among them
                extensions={**request.extensions, "sni_hostname": host},
            )
            try:
                return await self._inner.handle_async_request(direct)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure

    async def aclose(self) -> None:
        """Close the connection."""
        await self._inner.aclose()


def timeouts(idle_s: float) -> dict[str, Any]:
    """Of a request: seconds for each step of it."""
    return {"timeout": {"connect": 10.0, "read": idle_s, "write": idle_s, "pool": 10.0}}
