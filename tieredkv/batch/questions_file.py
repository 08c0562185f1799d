"""Many questions about many videos: a JSON line for each, and a run that was cut off anywhere goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tieredkv.batch.answers_file import Answers
from tieredkv.errors import FAILURES, BatchError, OptionError, reason

_NO_JSON = ("generation_config", "logits_processor", "stopping_criteria", "streamer")
_NAMED = 10
"""Lines whose fault is told; of more only the number."""


@dataclass(frozen=True, slots=True)
class Question:
    """A line of the questions' file."""

    id: str | int
    """As given, or the line's number and the first digits of the SHA-256 of its text."""
    video: str
    """As given."""
    path: Path
    """The video; a relative one lies beside the file."""
    text: str
    options: dict[str, Any]
    """Generation options."""


def read_questions(file: Path) -> list[Question]:
    """The questions of a file of JSON lines; empty lines are passed over.

    Raises `BatchError` naming the lines that are no object with "video" and "question", both text, or have an id that
    another has, or an option that is none.
    """
    try:
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise BatchError(f"{file} cannot be read: {error.strerror}.") from None
    questions: list[Question] = []
    faults: list[str] = []
    first: dict[str, int] = {}
    for number, line in enumerate(map(bytes.strip, lines), 1):
        if not line:
            continue
        try:
            question = _question(number, line, file.parent)
        except ValueError as error:
            faults.append(f"line {number} {error}")
            continue
        key = str(question.id)
        if key in first:
            faults.append(f"line {number} has the id of line {first[key]}")
        first.setdefault(key, number)
        questions.append(question)
    if faults:
        more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise BatchError(f"{file}: {'; '.join(faults[:_NAMED])}{more}.")
    if not questions:
        raise BatchError(f'{file} holds no question: give lines such as {{"video": "a.mp4", "question": "What ...?"}}.')
    return questions


def _question(number: int, line: bytes, folder: Path) -> Question:
    """Raises `ValueError`, saying what the line is or has."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({str(error).split(':')[0]})") from None
    if not isinstance(found, dict):
        raise ValueError("is not a JSON object")
    for name in ("video", "question"):
        if not isinstance(found.get(name), str):
            raise ValueError(f'has no "{name}" that is text')
    given = found.get("id")
    own = f"{number}-{hashlib.sha256(line).hexdigest()[:12]}"
    if given is not None and (isinstance(given, bool) or not isinstance(given, str | int) or given == ""):
        raise ValueError("has an id that is neither text nor a whole number")
    options = {name: value for name, value in found.items() if name not in ("video", "question", "id")}
    if options:
        from tieredkv.session import generation

        if here := [name for name in _NO_JSON if name in options]:
            raise ValueError(f"has {here[0]!r}, which a line cannot hold")
        try:
            generation.check_options(options)
        except OptionError as error:
            raise ValueError(f"has an option that is not valid: {str(error).rstrip('.')}") from None
    chosen = own if given is None else given
    return Question(chosen, found["video"], folder / found["video"], found["question"], options)


def run(
    questions: Sequence[Question],
    answers: Answers,
    open_session: Callable[[Path, Sequence[Question]], Any],
    options: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Answer what `answers` has no line for, video by video in the order in which they first appear.

    open_session(video, its questions): a `VideoSession`, which is left when they are answered. options: generation
    options of questions that do not say otherwise. say: told of progress, a line at a time. What fails is an error
    line; a failing disk is an `OSError`, and ends the run.
    """
    groups: dict[Path, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.path, []).append(question)
    for number, (video, group) in enumerate(groups.items(), 1):
        pending = [question for question in group if not answers.has(question)]
        if not pending:
            continue
        say(f"video {number} of {len(groups)}, {len(pending)} to answer: {video}")
        try:
            session = open_session(video, pending)
        except FAILURES as error:
            for question in pending:
                answers.fail(question, error)
            say(f"  failed: {reason(error)}")
            continue
        with session:
            for question in pending:
                try:
                    answer = session.ask(question.text, **{**options, **question.options})
                except FAILURES as error:
                    answers.fail(question, error)
                    say(f"  {question.id} failed: {reason(error)}")
                    continue
                answers.answer(question, answer.text, {"token_ids": answer.token_ids, **answer.stats.as_dict()})
                say(f"  {question.id} answered, {len(answers.answered) + len(answers.failed)} of {len(questions)}")
