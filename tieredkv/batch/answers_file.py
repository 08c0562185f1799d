"""The file of answers of a run: one line per question, written by one process at a time.

Each line is synced before the next is written, so only the last can be incomplete; resuming removes it. A line belongs
to the question with its id. A file that no run of these questions can have written is refused and never changed.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tieredkv.batch.answers import Answers
from tieredkv.batch.questions_file import BatchQuestion
from tieredkv.errors import BatchError
from tieredkv.storage.atomic import replace_file, sync_folder
from tieredkv.storage.json_text import to_json

_FIRST_BYTES = b'{"id": '


class AnswersFile(Answers):
    """The open file of answers, locked against other processes."""

    def __init__(self, file: Path, questions: Sequence[BatchQuestion], *, resume: bool, retry_errors: bool) -> None:
        """resume: continue an existing file. retry_errors: treat its error lines as not answered.

        Raises `BatchError` if the file exists and `resume` is not set, is locked by another process, does not belong
        to these questions, or cannot be written.
        """
        super().__init__()
        self.file = file
        self._descriptor: int | None = None
        self._kept, self._unchanged = b"", True
        try:
            self._descriptor = os.open(file, os.O_RDWR | os.O_APPEND)
        except FileNotFoundError:
            if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
                raise BatchError(f"{file} cannot be written: there is no such folder, or it is read-only.") from None
            return
        except OSError as error:
            raise BatchError(f"{file} cannot be written: {error.strerror}.") from None
        try:
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise BatchError(f"{file} is not a regular file: give another name, or - for stdout.")
            if not resume:
                raise BatchError(f"{file} exists already: give --resume to continue it, or another name.")
            self._resume(self._descriptor, questions, retry_errors)
        except BaseException:
            self.close()
            raise

    def _resume(self, descriptor: int, questions: Sequence[BatchQuestion], retry_errors: bool) -> None:
        """Lock an existing file, and determine which of its lines stay."""
        _lock(descriptor, self.file)
        if not os.path.samestat(os.fstat(descriptor), os.stat(self.file)):
            raise BatchError(f"{self.file} was written by another run meanwhile: give --resume again.")
        content = self.file.read_bytes()
        complete, newline, rest = content.rpartition(b"\n")
        if not (rest.startswith(_FIRST_BYTES) or _FIRST_BYTES.startswith(rest)):
            raise BatchError(f"{self.file} is not a file of answers: give another name.")
        asked = _Asked(questions)
        kept: list[bytes] = []
        for number, line in enumerate(complete.split(b"\n") if newline else [], 1):
            key, fields = self._parse(number, line)
            is_error = "error" in fields
            if is_error and retry_errors:
                continue
            if key in self.answered | self.failed:
                raise BatchError(f"{self.file}: line {number} answers {key!r} a second time: remove one of them.")
            if not asked.includes(key, fields["video"], fields["question"]):
                raise BatchError(
                    f"{self.file}: line {number} answers {key!r}, which is not among the questions: they were changed "
                    "since; give another name."
                )
            (self.failed if is_error else self.answered).add(key)
            kept.append(line)
        self._kept = b"".join(line + b"\n" for line in kept)
        self._unchanged = self._kept == content

    def _parse(self, number: int, line: bytes) -> tuple[str, dict[str, Any]]:
        """The id and all fields of a line. Raises `BatchError` for a line that no run writes."""
        with suppress(ValueError, TypeError):
            fields = json.loads(line)
            names = fields.keys() if isinstance(fields, dict) else set()
            if {"id", "video", "question"} <= names and {"error", "text"} & names:
                return str(fields["id"]), fields
        raise BatchError(f"{self.file}: line {number} is not an answer: this is another file, or it is damaged.")

    def begin(self) -> None:
        """Prepare the file for writing: create it, or remove an incomplete line and errors that are to be retried."""
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self.file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                raise BatchError(f"{self.file} was written by another run meanwhile: give --resume.") from None
            _lock(self._descriptor, self.file)
            sync_folder(self.file.parent)
        elif not self._unchanged:
            self._replace(self._descriptor)

    def _replace(self, old: int) -> None:
        """Replace the open file by one with only the lines that stay."""
        try:
            with replace_file(self.file.resolve(), len(self._kept)) as part:  # resolved: a link stays a link
                self._descriptor = os.open(part, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
                _lock(self._descriptor, self.file)  # before the file has its name: no other run can lock it first
                os.fchmod(self._descriptor, os.fstat(old).st_mode & 0o777)
                _write(self._descriptor, self._kept, self.file)
        finally:
            if self._descriptor != old:
                os.close(old)

    def _write_line(self, line: dict[str, Any]) -> None:
        assert self._descriptor is not None, "call begin first"
        _write(self._descriptor, to_json(line).encode() + b"\n", self.file)

    def close(self) -> None:
        """Close and unlock the file. May be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _Asked:
    """The questions, by id."""

    def __init__(self, questions: Sequence[BatchQuestion]) -> None:
        self._by_id = {str(question.id): (question.video, question.text) for question in questions}
        self._lines = {question.line: question.text for question in questions if question.line is not None}

    def includes(self, key: str, video: Any, text: Any) -> bool:
        """Whether a run of these questions wrote an answer, perhaps about a film since removed from its folder."""
        if key in self._by_id:
            return self._by_id[key] == (video, text)
        line = key.removesuffix(f":{video}")
        return line in self._lines and self._lines[line] == text


def _lock(descriptor: int, file: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BatchError(f"{file} is being written by another run: wait for it.") from None


def _write(descriptor: int, data: bytes, file: Path) -> None:
    """Write all of `data` and sync. Raises `OSError` with the file's name."""
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None
