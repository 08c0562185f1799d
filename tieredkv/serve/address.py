"""The server's address: taken before a model is loaded, which may take minutes. Imports no web framework."""

from __future__ import annotations

import socket

from tieredkv.errors import OptionError


def bound(host: str, port: int) -> socket.socket:
    """A socket bound to an address of this machine, which does not listen yet. Raises `OptionError`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OptionError(f"host={host!r} is not an address of this machine ({error.strerror or error}).") from None
    family, kind, protocol, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that ended just now
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OptionError(
            f"port {port} of {host} cannot be used ({error.strerror}): give another --port, or 0 for any."
        ) from None
    return listener


def url(host: str, listener: socket.socket) -> str:
    """Where the server is, as a browser on this machine may call it. host: as it was given."""
    address, port = listener.getsockname()[:2]
    name = host if host == "localhost" else address
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/"
