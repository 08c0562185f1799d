"""Films as requests show them, for tests of the media."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

from tieredkv.serve.asked import Film, Shown
from tieredkv.serve.media.guarded import guarded
from tieredkv.serve.media.identity import Identity
from tieredkv.serve.media.limits import Limits
from tieredkv.video.sampling import Sampling

SHORT = Limits(patience_s=5.0)
"""Nothing in a test takes longer."""


def identity_of(path: Path) -> Identity:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return Identity.of(descriptor)
    finally:
        os.close(descriptor)


def shown(path: Path, kind: Literal["video", "image"] = "video", **sampling) -> Shown:
    film = Film(path, hashlib.sha256(path.read_bytes()).hexdigest(), path.name, kind)
    return Shown(film, Sampling(**sampling))


def opened(path: Path, kind: Literal["video", "image"] = "video", limits: Limits = SHORT, **sampling):
    """The source that a session would read."""
    return guarded(shown(path, kind, **sampling), identity_of(path), limits).open(Sampling(fps=1.0))
