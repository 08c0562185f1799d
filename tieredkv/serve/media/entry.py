"""A film that the server keeps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from tieredkv.serve.media.identity import Identity


@dataclass(slots=True, eq=False)
class Entry:
    """A film in the store."""

    id: str
    path: Path
    name: str
    sha256: str
    identity: Identity
    created: int
    owner: str = ""
    purpose: str = "user_data"
    listed: bool = True
    """An upload; False: a copy, which is made again if it is missing."""
    permanent: bool = False
    used: float = field(default_factory=time.monotonic)
    pins: int = 0
    """By questions; it is not deleted meanwhile."""
    readers: int = 0
    """By players; it does not leave for another film meanwhile."""

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.identity.size
