"""The settings of a server, checked before anything is loaded. Imports neither torch nor a web framework."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tieredkv.errors import OptionError, check_value, check_whole, is_number
from tieredkv.video.sampling import Sampling

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Hosts that only programs of this machine reach."""
_HOST_NAME = re.compile(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?")
_FETCHED = re.compile(rf"(\*\.)?{_HOST_NAME.pattern}(:\d{{1,5}})?")
_ABOVE_ZERO = ("sessions_gb", "timeout", "upload_gb", "uploads_gb", "body_mb", "video_hours")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server runs. Sizes are GiB (2**30 bytes), times seconds."""

    model: str | None = None
    """A local path or a hub id; None: the bundled toy."""
    weights: str | None = None
    tiers: dict[str, Any] = field(default_factory=dict)
    """Fields of `TierConfig` that were given."""
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    insecure: bool = False
    """Another host than the loopback without a key."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which clients may call this server, beside `host`, the loopback's names and addresses."""
    videos: Path | None = None
    """The only folder below which `file:` URLs may point."""
    sessions: Path | None = None
    """Where sessions are kept; None: they are forgotten when they leave host memory."""
    sessions_gb: float = 50.0
    """Most that the folder of sessions may take."""
    open_gb: float | None = None
    """Most host memory of all open sessions together; None: as much as one may take (`host_kv_gb`)."""
    queue: int = 32
    """Requests that wait; one more is refused."""
    timeout: float = 600.0
    """Of a request, from when its films are there to the end of its answer. Fetching a film has limits of its own."""
    grace: float = 30.0
    """What runs when the server is stopped may go on for so long."""
    hosts: tuple[str, ...] = ()
    """From which http(s) URLs are fetched; "*.example.org" is all below it, and without a port 80 and 443 are meant."""
    any_host: bool = False
    upload_gb: float = 4.0
    """Most of one film that is uploaded or fetched."""
    uploads_gb: float = 20.0
    """Most of all of them."""
    body_mb: float = 64.0
    """Most of one request's JSON, MiB; films as `data:` URLs are in it."""
    video_hours: float = 12.0
    """Longest film."""
    max_new_tokens: int = 512
    """Of answers whose request does not say."""
    system: str | None = None
    """Of conversations that have none."""
    fps: float | None = None
    max_frames: int | None = None
    max_pixels: int | None = None
    """Of films whose request does not say."""

    def check(self) -> Settings:
        """These settings. Raises a `TieredKVError` for what cannot be: one sentence, what is wrong and what to do."""
        check_whole("port", self.port, 0)
        check_value(self.port < 2**16, "port", self.port, "a number of at most 65535, or 0 for any that is free")
        check_value(bool(self.host.strip()), "host", self.host, "a name or an address of this machine")
        if not (self.is_loopback or self.api_keys or self.insecure):
            raise OptionError(
                f"host={self.host!r} lets other machines in without a key: give one (TIEREDKV_API_KEY, or "
                "--api-key-file FILE), or say --insecure."
            )
        for key in self.api_keys:
            if not (key.isascii() and key.isprintable()) or not key or " " in key:  # not shown: it is a secret
                raise OptionError("an API key has no characters, or not only ASCII ones without spaces: give another.")
        for name, folder in (("videos", self.videos), ("sessions", self.sessions)):
            if folder is not None and not folder.is_dir():
                raise OptionError(f"--{name} {folder}: there is no such folder: create it, or give another.")
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            check_value(is_number(value) and value > 0, name, value, "a number above 0")
        check_value(
            self.open_gb is None or (is_number(self.open_gb) and self.open_gb > 0),
            "open_gb",
            self.open_gb,
            "a number of GiB above 0",
        )
        check_value(is_number(self.grace) and self.grace >= 0, "grace", self.grace, "seconds, at least 0")
        if self.upload_gb > self.uploads_gb:
            raise OptionError(
                f"upload_gb={self.upload_gb:g} is more than uploads_gb={self.uploads_gb:g}, of all: raise that."
            )
        check_whole("queue", self.queue)
        check_whole("max_new_tokens", self.max_new_tokens)
        for name in self.hosts:
            if not (_FETCHED.fullmatch(name) or is_address(name)):
                raise OptionError(
                    f"{name!r} is no host to fetch from: give one such as films.example.org, *.example.org or "
                    "films.example.org:8080."
                )
        for name in self.allowed_hosts:
            if not (_HOST_NAME.fullmatch(name) or is_address(name)):
                raise OptionError(
                    f"{name!r} is not the name of a host: give one such as films.example.org, without port."
                )
        Sampling(fps=self.fps, max_frames=self.max_frames, max_pixels=self.max_pixels)
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine can reach the server."""
        return self.host in LOOPBACK or (is_address(self.host) and ipaddress.ip_address(self.host).is_loopback)


def is_address(host: str) -> bool:
    """Whether a host is an IP address, without brackets."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
