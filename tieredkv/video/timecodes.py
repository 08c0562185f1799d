"""Times in a video as people write them: seconds, or 1:00 and 1:02:03.5 as players show them."""

from __future__ import annotations

import re
from typing import Any

from tieredkv.errors import VideoError

_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d*)?)", re.ASCII)
TIMES = ("start", "end")
"""Options that are times."""


def seconds(name: str, value: str | float) -> float:
    """A time in seconds. name: of the option, for the `VideoError` that is raised for anything but a time."""
    text = str(value).strip()
    if match := _CLOCK.fullmatch(text):
        hours, minutes, rest = int(match[1] or 0), int(match[2]), float(match[3])
        if rest < 60 and (match[1] is None or minutes < 60):
            return 3600.0 * hours + 60.0 * minutes + rest
    try:
        return float(text)
    except ValueError:
        raise VideoError(f"{name}={value!r} is not valid: give seconds, or a time as in 1:00 or 1:02:03.5.") from None


def with_seconds(options: dict[str, Any]) -> dict[str, Any]:
    """The options, with times that are given as text in seconds."""
    return {
        name: seconds(name, value) if name in TIMES and isinstance(value, str) else value
        for name, value in options.items()
    }


def shown(time: float) -> str:
    """Seconds for a message, from a minute on also as a clock shows them: "75.5 (1:15.5)"."""
    if time < 60:
        return f"{time:g}"
    minutes, rest = divmod(round(time, 3), 60)
    hours, minutes = divmod(int(minutes), 60)
    clock = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    fraction = f"{rest % 1:.3f}".rstrip("0").rstrip(".")[1:]
    return f"{time:.10g} ({clock}:{int(rest):02}{fraction})"
