"""Keys of sessions: equal for what gives the same cache. A file is named after one; its content is checked all the
same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tieredkv.video.sampling import Sampling
from tieredkv.video.subtitles import AUTO, read_cues, subtitles_hash


def digest(identity: Any) -> str:
    """64 hexadecimal digits for a JSON value."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def sampling_key(sampling: Sampling) -> dict[str, Any]:
    """A sampling as a JSON value, such that 2 and 2.0 are one rate, and a subtitle file is what it holds. Raises
    `VideoError` if that cannot be read."""
    return {name: _plain(getattr(sampling, name)) for name in sampling.given()}


def _plain(value: Any) -> Any:
    if not isinstance(value, str):
        return float(value)
    return value if value == AUTO else subtitles_hash(read_cues(value))
