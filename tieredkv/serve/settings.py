"""The settings of a server, checked before anything is loaded. Imports neither torch nor a web framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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
    """Of a request, from its arrival to its last byte."""
    grace: float = 30.0
    """What runs when the server is stopped may go on for so long."""
    hosts: tuple[str, ...] = ()
    """From which http(s) URLs are fetched."""
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
