"""EngineState: what an engine has done and holds now, for health checks and metrics."""

from __future__ import annotations

from dataclasses import dataclass

from tieredkv.serve.engine.sessions import Tier


@dataclass(slots=True)
class Counts:
    """Requests by how they ended, and sessions by where they came from, since the start."""

    served: int = 0
    """Answered, or prepared."""
    refused: int = 0
    """Because the queue was full or the server was shutting down."""
    cancelled: int = 0
    """Their reader went away."""
    timed_out: int = 0
    failed: int = 0
    """With any other error."""
    open_already: int = 0
    """Requests whose session was in memory."""
    loaded: int = 0
    """Sessions read from disk."""
    ingested: int = 0


@dataclass(frozen=True, slots=True)
class EngineState:
    """At one moment."""

    waiting: int
    running: int
    """0 or 1."""
    stopping: bool
    counts: Counts
    device: Tier
    host: Tier
    disk: Tier
