"""A file of answers is resumed or refused, and holds each question once."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from batch_files import answer, ask, found

from tieredkv.batch.answers_file import AnswersFile
from tieredkv.batch.questions_file import read_questions
from tieredkv.errors import BatchError, OutputError


def test_an_existing_file_is_unchanged_without_resume(tmp_path, questions):
    file = tmp_path / "answers.jsonl"
    file.write_text("precious")
    with pytest.raises(BatchError, match="exists already: give --resume"):
        answer(file, questions, resume=False)
    assert file.read_text() == "precious"


@pytest.mark.parametrize(
    "text",
    ["precious\n", "precious", '{"id": "first"}\n', '{"video": "b.mp4", "question": "one", "id": "first"}\n', "3\n"],
)
def test_a_file_that_is_not_ours_is_never_changed(tmp_path, questions, text):
    file = tmp_path / "answers.jsonl"
    file.write_text(text)
    with pytest.raises(BatchError, match=r"is not a file of answers|line 1 is not an answer"):
        answer(file, questions)
    assert file.read_text() == text


def test_resuming_after_a_cut_at_any_byte_gives_the_same_file(tmp_path, questions, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow over a thousand runs
    file = tmp_path / "answers.jsonl"
    answer(file, questions)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        log: list[Any] = []
        answer(file, questions, log=log)
        assert file.read_bytes() == whole, length
        done = whole[:length].count(b"\n")
        assert sum(isinstance(entry, tuple) for entry in log) == max(0, 4 - done)  # the fifth has no video


def test_a_file_of_an_older_version_is_continued(tmp_path):
    """Its text is escaped, and its answers have no evidence."""
    file, old = tmp_path / "answers.jsonl", b'{"id": 1, "video": "a.mp4", "question": "zwei \\u00fc", "text": "two"}\n'
    file.write_bytes(old)
    lines = {"id": 1, "video": "a.mp4", "question": "zwei ü"}, {"id": 2, "video": "a.mp4", "question": "drei"}
    answer(file, ask(tmp_path, *lines))
    assert file.read_bytes().startswith(old)
    assert [row["text"] for row in found(file)] == ["two", "DREI"]


def test_errors_are_retried_only_on_request(tmp_path, questions):
    file = tmp_path / "answers.jsonl"
    answer(file, questions)
    before, log = file.read_bytes(), []
    answers = answer(file, questions, log=log)
    assert file.read_bytes() == before
    assert log == []
    assert len(answers.failed) == 2
    answers = answer(file, questions, retry_errors=True, log=log)
    assert log == ["b.mp4", ("bad", {"max_new_tokens": 9}), "closed", "gone.mp4"]
    assert Counter(map(str, found(file))) == Counter(map(str, map(json.loads, before.splitlines())))


def test_a_corrected_question_is_answered_when_errors_are_retried(tmp_path):
    file = tmp_path / "answers.jsonl"
    answer(file, ask(tmp_path, {"video": "gone.mp4", "question": "one"}, {"video": "a.mp4", "question": "two"}))
    corrected = ask(tmp_path, {"video": "b.mp4", "question": "one"}, {"video": "a.mp4", "question": "two"})
    answers = answer(file, corrected, retry_errors=True)
    assert answers.failed == set()
    assert sorted(row["text"] for row in found(file)) == ["ONE", "TWO"]


@pytest.mark.parametrize("changed", [{"question": "other"}, {"video": "other.mp4"}, {"id": "other"}])
def test_a_file_with_answers_to_other_questions_is_refused(tmp_path, changed):
    file, line = tmp_path / "answers.jsonl", {"id": 1, "video": "a.mp4", "question": "one"}
    answer(file, ask(tmp_path, line))
    before = file.read_bytes()
    with pytest.raises(BatchError, match="which is not among the questions: they were changed since"):
        answer(file, ask(tmp_path, line | changed))
    assert file.read_bytes() == before


def test_a_second_answer_to_a_question_is_refused(tmp_path, questions):
    file = tmp_path / "answers.jsonl"
    answer(file, questions)
    first = file.read_bytes().splitlines(keepends=True)[0]
    file.write_bytes(file.read_bytes() + first)
    with pytest.raises(BatchError, match="line 6 answers 'first' a second time"):
        answer(file, questions)


def test_two_runs_do_not_write_one_file(tmp_path, questions):
    file = tmp_path / "answers.jsonl"
    asked = read_questions(questions)
    with AnswersFile(file, asked, resume=True, retry_errors=False) as answers:
        answers.begin()
        with pytest.raises(BatchError, match="is being written by another run"):
            answer(file, questions)
    assert len(answer(file, questions).answered) == 3


def test_nothing_is_written_before_a_run_begins(tmp_path, questions):
    file = tmp_path / "answers.jsonl"
    with AnswersFile(file, read_questions(questions), resume=False, retry_errors=False):
        assert not file.exists()
    answer(file, questions)
    torn = file.read_bytes()[:-5]
    file.write_bytes(torn)
    with AnswersFile(file, read_questions(questions), resume=True, retry_errors=True):
        assert file.read_bytes() == torn


@pytest.mark.parametrize("name", ["gone/answers.jsonl", "folder"])
def test_a_path_that_cannot_be_written_is_refused(tmp_path, questions, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(BatchError, match="cannot be written"):
        answer(tmp_path / name, questions)


@pytest.mark.parametrize("resume", [True, False])
def test_what_is_not_a_regular_file_is_refused(questions, resume):
    with pytest.raises(BatchError, match="/dev/null is not a regular file: give another name, or - for stdout"):
        answer(Path("/dev/null"), questions, resume=resume)


def test_a_file_with_an_error_to_a_changed_question_is_refused(tmp_path):
    file, line = tmp_path / "answers.jsonl", {"id": 1, "video": "a.mp4", "question": "bad"}
    answer(file, ask(tmp_path, line))
    with pytest.raises(BatchError, match="which is not among the questions: they were changed since"):
        answer(file, ask(tmp_path, line | {"question": "good"}))


def test_a_file_that_is_rewritten_keeps_its_mode_its_link_and_its_lock(tmp_path, questions):
    file, link = tmp_path / "answers.jsonl", tmp_path / "link.jsonl"
    answer(file, questions)
    file.chmod(0o640)
    link.symlink_to(file)
    with AnswersFile(link, read_questions(questions), resume=True, retry_errors=True) as answers:
        answers.begin()  # without its two errors
        assert len(found(file)) == 3
        with pytest.raises(BatchError, match="is being written by another run"):
            answer(file, questions)
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o640


def test_a_file_that_cannot_be_rewritten_is_left_alone(tmp_path, questions, monkeypatch):
    file = tmp_path / "answers.jsonl"
    answer(file, questions)
    before = file.read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OutputError, match=r"answers\.jsonl could not be written: No space left on device"):
            answer(file, questions, retry_errors=True)
    assert file.read_bytes() == before
    assert sorted(found.name for found in tmp_path.iterdir()) == ["answers.jsonl", "questions.jsonl"]
    assert len(answer(file, questions).answered) == 3  # the lock is gone
