"""The answers of a run: one line per question, written as soon as it is known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

from tieredkv.batch.questions_file import BatchQuestion
from tieredkv.errors import reason
from tieredkv.storage.json_text import print_json


class Answers(ABC):
    """Where answers are written. Each id has at most one line. A context manager that closes it."""

    def __init__(self) -> None:
        self.failed: set[str] = set()
        """Ids of error lines."""
        self.answered: set[str] = set()

    def begin(self) -> None:  # noqa: B027 - not every kind has something to do
        """Prepare for the first line. Nothing is written before."""

    def has(self, question: BatchQuestion) -> bool:
        """Whether the question has a line, answer or error."""
        return str(question.id) in self.answered | self.failed

    def answer(self, question: BatchQuestion, fields: dict[str, Any]) -> None:
        """Write an answer: its "text", and what else its line is to hold."""
        self._write(question, fields)
        self.answered.add(str(question.id))

    def fail(self, question: BatchQuestion, error: BaseException) -> None:
        """Write why there is no answer."""
        self._write(question, {"error": reason(error)})
        self.failed.add(str(question.id))

    def _write(self, question: BatchQuestion, fields: dict[str, Any]) -> None:
        self._write_line({"id": question.id, "video": question.video, "question": question.text, **fields})

    @abstractmethod
    def _write_line(self, line: dict[str, Any]) -> None: ...

    def close(self) -> None:  # noqa: B027
        """May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PrintedAnswers(Answers):
    """Answers on stdout."""

    def _write_line(self, line: dict[str, Any]) -> None:
        print_json(line)
