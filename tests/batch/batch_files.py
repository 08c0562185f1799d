"""Files of questions and answers, and fake sessions that answer them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tieredkv.batch.answers_file import AnswersFile
from tieredkv.batch.questions_file import read_questions
from tieredkv.batch.run import run
from tieredkv.errors import PromptError, VideoError
from tieredkv.video.sampling import Sampling


class Session:
    """Answers in capitals, and refuses to answer "bad"."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def ask(self, text: str, **options: Any) -> Any:
        self.log.append((text, options))
        if text == "bad":
            raise PromptError("the prompt is bad.")
        return SimpleNamespace(as_dict=lambda: {"text": text.upper(), "token_ids": [1, 2], "n": 2})

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.log.append("closed")


def answer(
    file: Path, questions: Path, resume: bool = True, retry_errors: bool = False, log: list[Any] | None = None
) -> AnswersFile:
    """Answer a file of questions with fake sessions; gone.mp4 cannot be opened."""
    log = [] if log is None else log

    def open_session(video: Path, sampling: Sampling, pending: Any) -> Session:
        log.append(video.name)
        if video.name == "gone.mp4":
            raise VideoError(f"{video}: no such file.")
        return Session(log)

    asked = read_questions(questions)
    with AnswersFile(file, asked, resume=resume, retry_errors=retry_errors) as answers:
        answers.begin()
        run(asked, answers, open_session, {"max_new_tokens": 9}, lambda line: None)
    return answers


def ask(folder: Path, *lines: dict[str, Any] | str) -> Path:
    file = folder / "questions.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def found(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]
