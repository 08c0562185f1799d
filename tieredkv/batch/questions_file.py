"""A file of questions about videos: JSON lines."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tieredkv.errors import BatchError, OptionError

_NOT_IN_JSON = ("generation_config", "logits_processor", "stopping_criteria", "streamer")
_MOST_REPORTED = 10
"""Faulty lines that a message describes; further ones are only counted."""


@dataclass(frozen=True, slots=True)
class BatchQuestion:
    """One line of a file of questions."""

    id: str | int
    """As given, or the line's number and the first digits of the SHA-256 of its text."""
    video: str
    """As given."""
    path: Path
    """The video; a relative path starts from the folder of the file."""
    text: str
    options: dict[str, Any]
    """Generation options."""


def read_questions(file: Path) -> list[BatchQuestion]:
    """The questions of a file of JSON lines; empty lines are skipped.

    Raises `BatchError` naming each line that is not an object with the texts "video" and "question", has the id of
    another line, or has an invalid option.
    """
    try:
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise BatchError(f"{file} cannot be read: {error.strerror}.") from None
    questions: list[BatchQuestion] = []
    faults: list[str] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(map(bytes.strip, lines), 1):
        if not line:
            continue
        try:
            question = _parse(number, line, file.parent)
        except ValueError as error:
            faults.append(f"line {number} {error}")
            continue
        key = str(question.id)
        if key in line_of_id:
            faults.append(f"line {number} has the id of line {line_of_id[key]}")
        line_of_id.setdefault(key, number)
        questions.append(question)
    if faults:
        more = f"; and {len(faults) - _MOST_REPORTED} more" if len(faults) > _MOST_REPORTED else ""
        raise BatchError(f"{file}: {'; '.join(faults[:_MOST_REPORTED])}{more}.")
    if not questions:
        raise BatchError(f'{file} holds no question: give lines such as {{"video": "a.mp4", "question": "What ...?"}}.')
    return questions


def _parse(number: int, line: bytes, folder: Path) -> BatchQuestion:
    """Raises `ValueError` with what is wrong with the line, as the rest of a sentence that begins with "line 3"."""
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({str(error).split(':')[0]})") from None
    if not isinstance(given, dict):
        raise ValueError("is not a JSON object")
    for name in ("video", "question"):
        if not isinstance(given.get(name), str):
            raise ValueError(f'has no "{name}" that is text')
    key = given.get("id")
    if key is not None and (isinstance(key, bool) or not isinstance(key, str | int) or key == ""):
        raise ValueError("has an id that is neither text nor a whole number")
    if key is None:
        key = f"{number}-{hashlib.sha256(line).hexdigest()[:12]}"
    options = {name: value for name, value in given.items() if name not in ("video", "question", "id")}
    if options:
        from tieredkv.session import generation

        if refused := [name for name in _NOT_IN_JSON if name in options]:
            raise ValueError(f"has {refused[0]!r}, which a line cannot hold")
        try:
            generation.check_options(options)
        except OptionError as error:
            raise ValueError(f"has an option that is not valid: {str(error).rstrip('.')}") from None
    return BatchQuestion(key, given["video"], folder / given["video"], given["question"], options)
