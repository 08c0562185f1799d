"""The file of answers of a run: a line each, whole or cut off, each question once, one writer at a time.

A line is written in one go and synced, so that only the last of a file can be torn; going on cuts it off. Lines
belong to questions by id. What no run of these questions can have written is refused, never mended.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tieredkv.errors import BatchError, reason
from tieredkv.storage.atomic import sync_folder

if TYPE_CHECKING:
    from tieredkv.batch.questions_file import Question

_BEGINNING = b'{"id": '


class Answers:
    """The file of answers while questions are answered: one process at a time, each id once.

    Nothing is written before `begin`. A context manager; leaving it lets go of the file.
    """

    def __init__(self, file: Path, questions: Sequence[Question], *, resume: bool, retry_errors: bool) -> None:
        """resume: go on with a file that is there. retry_errors: take its error lines for not answered.

        Raises `BatchError` for a file that is there without `resume`, in the hands of another process, or not of these
        questions; and for one that cannot be written.
        """
        self.file = file
        self.failed: set[str] = set()
        """Ids of error lines."""
        self.answered: set[str] = set()
        self._descriptor: int | None = None
        self._kept, self._whole = b"", True
        try:
            self._descriptor = os.open(file, os.O_RDWR | os.O_APPEND)
        except FileNotFoundError:
            if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
                raise BatchError(f"{file} cannot be written: there is no such folder, or it is read-only.") from None
            return
        except OSError as error:
            raise BatchError(f"{file} cannot be written: {error.strerror}.") from None
        try:
            if not resume:
                raise BatchError(f"{file} is there already: give --resume to go on with it, or another name.")
            self._take_up(questions, retry_errors)
        except BaseException:
            self.close()
            raise

    def _take_up(self, questions: Sequence[Question], retry_errors: bool) -> None:
        assert self._descriptor is not None
        state = os.fstat(self._descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise BatchError(f"{self.file} is no regular file: give another name.")
        _lock(self._descriptor, self.file)
        if not os.path.samestat(state, os.stat(self.file)):
            raise BatchError(f"{self.file} was written by another run meanwhile: give --resume again.")
        found = self.file.read_bytes()
        complete, newline, torn = found.rpartition(b"\n")
        if not (torn.startswith(_BEGINNING) or _BEGINNING.startswith(torn)):
            raise BatchError(f"{self.file} is no file of answers: give another name.")
        asked = {str(question.id): question for question in questions}
        kept: list[bytes] = []
        for number, line in enumerate(complete.split(b"\n") if newline else [], 1):
            key, about = self._line(number, line)
            error = "error" in about
            if error and retry_errors:
                continue
            if key in self.answered | self.failed:
                raise BatchError(f"{self.file}: line {number} answers {key!r} a second time: remove one of them.")
            question = asked.get(key)
            if question is None or (question.video, question.text) != (about["video"], about["question"]):
                raise BatchError(
                    f"{self.file}: line {number} answers {key!r}, which the questions do not ask: they were changed "
                    "since; give another name."
                )
            (self.failed if error else self.answered).add(key)
            kept.append(line)
        self._kept = b"".join(line + b"\n" for line in kept)
        self._whole = self._kept == found

    def _line(self, number: int, line: bytes) -> tuple[str, dict[str, Any]]:
        """The id and all of a line that this program wrote."""
        with suppress(ValueError, TypeError):
            found = json.loads(line)
            names = found.keys() if isinstance(found, dict) else set()
            if {"id", "video", "question"} <= names and {"error", "text"} & names:
                return str(found["id"]), found
        raise BatchError(f"{self.file}: line {number} is no answer: this is another file, or it is damaged.")

    def begin(self) -> None:
        """Make the file ready to be written to: created, or rid of a torn line and of errors to be tried again."""
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self.file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                raise BatchError(f"{self.file} was written by another run meanwhile: give --resume.") from None
            _lock(self._descriptor, self.file)
            sync_folder(self.file.parent)
        elif not self._whole:
            self._replace(self._descriptor)

    def _replace(self, old: int) -> None:
        """Put what is kept in the file's place, all at once."""
        target = self.file.resolve()
        part = target.with_name(f"{target.name}.part")  # of a killed run, if there is one: the lock is ours
        new = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _lock(new, self.file)  # before it has the name, so that no other run can have it
            os.fchmod(new, os.fstat(old).st_mode & 0o777)
            _write(new, self._kept, self.file)
            os.replace(part, target)
        except BaseException:
            os.close(new)
            part.unlink(missing_ok=True)
            raise
        self._descriptor = new
        os.close(old)
        sync_folder(target.parent)

    def has(self, question: Question) -> bool:
        """Whether there is a line for it."""
        return str(question.id) in self.answered | self.failed

    def answer(self, question: Question, text: str, about: dict[str, Any]) -> None:
        """Write an answer. about: what else is to be in its line."""
        self._append(question, {"text": text, **about})
        self.answered.add(str(question.id))

    def fail(self, question: Question, error: BaseException) -> None:
        """Write why there is no answer."""
        self._append(question, {"error": reason(error)})
        self.failed.add(str(question.id))

    def _append(self, question: Question, rest: dict[str, Any]) -> None:
        assert self._descriptor is not None, "begin first"
        line = {"id": question.id, "video": question.video, "question": question.text, **rest}
        _write(self._descriptor, json.dumps(line).encode() + b"\n", self.file)

    def close(self) -> None:
        """Let go of the file. Twice is fine."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lock(descriptor: int, file: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BatchError(f"{file} is being written by another run: wait for it.") from None


def _write(descriptor: int, data: bytes, file: Path) -> None:
    """All of it, on disk when this returns. Raises `OSError` naming the file."""
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None
