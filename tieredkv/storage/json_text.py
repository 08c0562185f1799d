"""JSON for people and programs: text stays readable, and a value is one line."""

from __future__ import annotations

import errno
import json
import re
import sys
from typing import Any

_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_LINE_BREAKS = "\x85\u2028\u2029"
"""Characters at which some readers end a line; JSON allows them inside text."""


def to_json(value: Any, encoding: str = "utf-8") -> str:
    """The value in one line. Text is escaped only where `encoding` cannot hold it, as UTF-8 cannot half a character."""
    text = json.dumps(value, ensure_ascii=False)
    return _NOT_ASCII.sub(lambda found: found[0] if _stays(found[0], encoding) else json.dumps(found[0])[1:-1], text)


def print_json(value: Any) -> None:
    """Print the value as one line on stdout, at once, in the encoding of stdout. Raises `OSError`."""
    if sys.stdout is None:  # `print` would print nothing, without an error
        raise OSError(errno.EBADF, "it is closed", "stdout")
    print(to_json(value, getattr(sys.stdout, "encoding", None) or "utf-8"), flush=True)


def _stays(character: str, encoding: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return character not in _LINE_BREAKS
