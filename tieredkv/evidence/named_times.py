"""Times that an answer names, as people and models write them."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

_NAMED = re.compile(
    r"(?<![\d:.])(?:(?P<hours>\d+):(?=\d+:))?(?P<minutes>\d+):(?P<rest>[0-5]\d(?:\.\d+)?)(?![\d:])"
    r"|(?<![\d:.])(?P<seconds>\d+(?:\.\d+)?)\s*(?:seconds?|secs?|s)\b",
    re.ASCII | re.IGNORECASE,
)


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
    """Times in a text, in order: "1:02", "1:02:03.5", "12.5 seconds", "12.5s". Those not from `start` to `end`, in
    seconds, are left out: no frame is shown then."""
    found = (NamedTime(_seconds(match), match.group(), match.start()) for match in _NAMED.finditer(text))
    return tuple(time for time in found if start <= time.seconds <= end)


def _seconds(match: re.Match[str]) -> float:
    if match["seconds"] is not None:
        return float(match["seconds"])
    return 3600.0 * int(match["hours"] or 0) + 60.0 * int(match["minutes"]) + float(match["rest"])
