"""Times that an answer names, as people and models write them."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

_NAMED = re.compile(
    r"(?<![\d:.])(?:(?P<hours>\d+):(?=\d+:))?(?P<minutes>\d+):(?P<rest>[0-5]\d(?:\.\d+)?)(?!\d|[:.]\d)"
    r"|(?<![\d:.])(?:(?P<h>\d+)\s*(?:hours?|h)\b[,\s]*(?:and\s+)?)?(?:(?P<m>\d+)\s*(?:minutes?|min|m)\b[,\s]*(?:and\s+)?)?"
    r"(?P<seconds>\d+(?:\.\d+)?)\s*(?:seconds?|secs?|(?<!\d0)s)\b"
    r"|(?<![\d:.])(?:(?P<h2>\d+)\s*(?:hours?|h)\b[,\s]*(?:and\s+)?)?(?P<m2>\d+)\s*(?:minutes?|min)\b",
    re.ASCII | re.IGNORECASE,
)
_RANGE = re.compile(
    r"(?<![\d:.])(?P<seconds>\d+(?:\.\d+)?)(?=\s*(?:-|\u2013|to|and)\s*\d+(?:\.\d+)?\s*(?:seconds?|secs?)\b)", re.ASCII
)
"""The first of two times with one unit, as in "12 to 15 seconds"."""
# Whole tens directly before an "s" are left out: "the 60s" are years more often than seconds.


@dataclass(frozen=True, slots=True)
class NamedTime:
    """A time in an answer."""

    seconds: float
    """Of the file, as players show it."""
    text: str
    """As the answer writes it, such as "1:02" or "12.5 seconds"."""
    begin: int
    """Where in the answer's text it begins."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def named_times(text: str, start: float, end: float) -> tuple[NamedTime, ...]:
    """Times in a text, in order: "1:02", "1:02:03.5", "12.5 seconds", "12.5s", "1 minute 30 seconds", and both of
    "12 to 15 seconds". Those not from `start` to `end`, in seconds, are left out: no frame is shown then. The second
    in which `start` lies counts, as some models are told whole seconds."""
    matches = sorted((*_NAMED.finditer(text), *_RANGE.finditer(text)), key=lambda match: match.start())
    found = (NamedTime(_seconds(match.groupdict()), match.group(), match.start()) for match in matches)
    return tuple(time for time in found if math.floor(start) <= time.seconds <= end)


def _seconds(parts: dict[str, str | None]) -> float:
    hours = parts.get("hours") or parts.get("h") or parts.get("h2") or 0
    minutes = parts.get("minutes") or parts.get("m") or parts.get("m2") or 0
    return 3600.0 * int(hours) + 60.0 * int(minutes) + float(parts.get("rest") or parts.get("seconds") or 0)
