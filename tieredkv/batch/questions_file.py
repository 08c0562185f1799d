"""Questions about videos: JSON lines, in a file or on stdin."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tieredkv.batch.films import films
from tieredkv.errors import BatchError, OptionError, VideoError, check_value
from tieredkv.evidence.target import check_wanted
from tieredkv.session import generation_settings
from tieredkv.video.sampling import Sampling
from tieredkv.video.subtitles import AUTO
from tieredkv.video.timecodes import with_seconds

_NOT_IN_JSON = (
    "generation_config",
    "logits_processor",
    "prefix_allowed_tokens_fn",
    "source_fps",
    "stopping_criteria",
    "streamer",
    "tokenizer",
)
_SAMPLING = {field.name for field in fields(Sampling)} - set(_NOT_IN_JSON)
_MOST_REPORTED = 10
"""Faulty lines that a message describes; further ones are only counted."""


@dataclass(frozen=True, slots=True)
class BatchQuestion:
    """A question about one video: a line of a file of questions, or what a line asks about one film of a folder."""

    id: str | int
    """As given, or the line's number and the first digits of the SHA-256 of its text; then, for a film of a folder or
    a glob, ":" and `video`."""
    video: str
    """As given; for a film of a folder or a glob, as a line of its own would name it."""
    path: Path
    """The video; a relative path starts from the folder of the file."""
    text: str
    sampling: Sampling
    options: dict[str, Any]
    """Options of `VideoSession.ask`."""
    line: str | None = None
    """Id of the line, if it names a folder or a glob."""
    fault: BatchError | None = None
    """Why it cannot be asked: the folder or glob holds no film."""


def read_questions(file: Path | None, sampling: Sampling | None = None) -> list[BatchQuestion]:
    """The questions of a file of JSON lines; empty lines are skipped.

    file: None reads stdin to its end. sampling: of lines that set none. Raises `BatchError` naming each line that is
    not an object with the texts "video" and "question", has the id of another line, or has an invalid option, and for
    one subtitle file that would be that of several films.
    """
    name, folder = (str(file), file.parent) if file else ("stdin", Path())
    if file is None and sys.stdin is None:
        raise BatchError("stdin is closed: give a file of questions.")
    try:
        content = file.read_bytes() if file else sys.stdin.buffer.read()
    except OSError as error:
        raise BatchError(f"{name} cannot be read: {error.strerror}.") from None
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    questions: list[BatchQuestion] = []
    faults: list[str] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(map(bytes.strip, lines), 1):
        if not line:
            continue
        try:
            found = _each_film(_parse(number, line, folder, sampling or Sampling()), folder)
        except ValueError as error:
            faults.append(f"line {number} {error}")
            continue
        for question in found:
            key = str(question.id)
            if key in line_of_id:
                faults.append(f"line {number} has the id of line {line_of_id[key]}")
            line_of_id.setdefault(key, number)
        questions += found
    if faults:
        more = f"; and {len(faults) - _MOST_REPORTED} more" if len(faults) > _MOST_REPORTED else ""
        raise BatchError(f"{name}: {'; '.join(faults[:_MOST_REPORTED])}{more}.")
    if sampling is not None and sampling.subtitles not in (None, AUTO):
        count = len({question.path for question in questions if question.sampling.subtitles == sampling.subtitles})
        if count > 1:
            raise BatchError(
                f"{sampling.subtitles} would be the subtitles of {count} films in {name}: give {AUTO!r}, or each line "
                'its own "subtitles".'
            )
    if not questions:
        raise BatchError(f'{name} holds no question: give lines such as {{"video": "a.mp4", "question": "What ...?"}}.')
    return questions


def _each_film(question: BatchQuestion, folder: Path) -> list[BatchQuestion]:
    """The question, or one about each film if it names a folder or a glob. Raises `ValueError` as `_parse` does."""
    line = str(question.id)
    try:
        names = films(question.video, folder)
    except BatchError as error:
        return [replace(question, line=line, fault=error)]
    if names is None:
        return [question]
    if len(names) > 1 and question.sampling.subtitles not in (None, AUTO):
        raise ValueError(f"has one subtitle file for {len(names)} films: give each film a line, or {AUTO!r}")
    return [replace(question, id=f"{line}:{name}", video=name, path=folder / name, line=line) for name in names]


def _parse(number: int, line: bytes, folder: Path, sampling: Sampling) -> BatchQuestion:
    """Raises `ValueError` with what is wrong with the line, as the rest of a sentence that begins with "line 3"."""
    try:
        given = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text") from None
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
    own = {name: value for name, value in given.items() if name in _SAMPLING}
    options = {name: value for name, value in given.items() if name not in {"video", "question", "id", *own}}
    if refused := [name for name in _NOT_IN_JSON if name in options]:
        raise ValueError(f"has {refused[0]!r}, which a line cannot hold")
    if isinstance(own.get("subtitles"), str) and own["subtitles"] != AUTO:
        own["subtitles"] = str(folder / own["subtitles"])
    try:
        sampling = replace(sampling, **with_seconds(own))
        if options:
            _check_options(options)
    except (OptionError, VideoError) as error:
        raise ValueError(f"has an option that is not valid: {str(error).rstrip('.')}") from None
    return BatchQuestion(key, given["video"], folder / given["video"], given["question"], sampling, options)


def _check_options(options: dict[str, Any]) -> None:
    generation_settings.check_options(options, also=("evidence", "timestamps"))
    check_wanted(options.get("evidence", True))
    timestamps = options.get("timestamps", False)
    check_value(isinstance(timestamps, bool), "timestamps", timestamps, "true or false")
