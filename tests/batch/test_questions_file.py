"""A file of questions: refused whole or answered whole, whatever happens to the process or the disk meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tieredkv.batch import questions_file
from tieredkv.batch.answers_file import Answers
from tieredkv.batch.questions_file import read_questions
from tieredkv.errors import BatchError, PromptError, VideoError


class Session:
    """Answers in capitals, and refuses to answer "bad"."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def ask(self, text: str, **options: Any) -> Any:
        self.log.append((text, options))
        if text == "bad":
            raise PromptError("the prompt is bad.")
        return SimpleNamespace(text=text.upper(), token_ids=[1, 2], stats=SimpleNamespace(as_dict=lambda: {"n": 2}))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.log.append("closed")


def answer(
    file: Path, questions: Path, resume: bool = True, retry_errors: bool = False, log: list[Any] | None = None
) -> Answers:
    """Run it all with sessions that only pretend; gone.mp4 cannot be opened."""
    log = [] if log is None else log

    def open_session(video: Path, pending: Any) -> Session:
        log.append(video.name)
        if video.name == "gone.mp4":
            raise VideoError(f"{video}: no such file.")
        return Session(log)

    asked = read_questions(questions)
    with Answers(file, asked, resume=resume, retry_errors=retry_errors) as answers:
        answers.begin()
        questions_file.run(asked, answers, open_session, {"max_new_tokens": 9}, lambda line: None)
    return answers


def ask(folder: Path, *lines: dict[str, Any] | str) -> Path:
    file = folder / "questions.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def found(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def questions(tmp_path) -> Path:
    """Three videos, one of them missing, and a question that fails."""
    return ask(
        tmp_path,
        {"video": "b.mp4", "question": "one", "id": "first"},
        {"video": "a.mp4", "question": "zwei ü", "max_new_tokens": 3},
        {"video": "gone.mp4", "question": "three"},
        "",
        {"video": "./b.mp4", "question": "bad", "id": 4},
        {"video": "b.mp4", "question": "five"},
    )


def test_videos_are_opened_once_each_in_the_order_they_first_appear(tmp_path, questions):
    log: list[Any] = []
    answer(tmp_path / "answers.jsonl", questions, log=log)
    assert log == [
        "b.mp4",
        ("one", {"max_new_tokens": 9}),
        ("bad", {"max_new_tokens": 9}),
        ("five", {"max_new_tokens": 9}),
        "closed",
        "a.mp4",
        ("zwei ü", {"max_new_tokens": 3}),
        "closed",
        "gone.mp4",
    ]


def test_each_question_has_one_line_and_what_fails_says_why(tmp_path, questions):
    answers = answer(tmp_path / "answers.jsonl", questions)
    rows = {row["question"]: row for row in found(answers.file)}
    assert [row["question"] for row in found(answers.file)] == ["one", "bad", "five", "zwei ü", "three"]
    assert rows["one"] == {
        "id": "first",
        "video": "b.mp4",
        "question": "one",
        "text": "ONE",
        "token_ids": [1, 2],
        "n": 2,
    }
    assert rows["bad"] == {"id": 4, "video": "./b.mp4", "question": "bad", "error": "the prompt is bad."}
    assert rows["three"]["error"].endswith("gone.mp4: no such file.")
    assert answers.failed == {"4", str(rows["three"]["id"])}


def test_an_id_that_is_not_given_is_of_the_lines_number_and_text(tmp_path):
    line = '{"video": "a.mp4", "question": "same"}'
    one, two = read_questions(ask(tmp_path, line, line))
    assert one.id != two.id
    assert str(one.id).startswith("1-")
    (moved,) = [q for q in read_questions(ask(tmp_path, "", line)) if q.text == "same"]
    assert moved.id == two.id


def test_videos_lie_relative_to_the_file(tmp_path):
    file = ask(tmp_path, {"video": "films/a.mp4", "question": "?"}, {"video": "/b.mp4", "question": "?"})
    assert [question.path for question in read_questions(file)] == [tmp_path / "films/a.mp4", Path("/b.mp4")]


MALFORMED = {
    "not json": "is not JSON",
    "[1, 2]": "is not a JSON object",
    '{"video": "a.mp4"}': 'has no "question" that is text',
    '{"video": 3, "question": "?"}': 'has no "video" that is text',
    '{"video": "a.mp4", "question": "?", "id": 1.5}': "has an id that is neither text nor a whole number",
    '{"video": "a.mp4", "question": "?", "id": ""}': "has an id that is neither",
    '{"video": "a.mp4", "question": "?", "max_new_token": 3}': "Did you mean max_new_tokens?",
    '{"video": "a.mp4", "question": "?", "max_new_tokens": 0}': "max_new_tokens=0 is not valid",
    '{"video": "a.mp4", "question": "?", "num_beams": 4}': "num_beams=4 is not supported",
    '{"video": "a.mp4", "question": "?", "streamer": 1}': "has 'streamer', which a line cannot hold",
    '{"video": "a.mp4", "question": "?", "id": "x"}': "has the id of line 1",
    "[" * 10_000: "is not JSON",
}


@pytest.mark.parametrize(("line", "message"), MALFORMED.items(), ids=list(MALFORMED.values()))
def test_a_malformed_line_is_refused_with_its_number(tmp_path, line, message):
    file = ask(tmp_path, {"video": "a.mp4", "question": "?", "id": "x"}, "", line)
    with pytest.raises(BatchError) as refusal:
        read_questions(file)
    assert f"line 3 {message.partition('Did')[0].strip()}" in str(refusal.value) or message in str(refusal.value)
    assert "line 3 " in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_all_malformed_lines_are_named_up_to_ten(tmp_path):
    with pytest.raises(BatchError, match=r"line 1 is not JSON .*; line 10 is not JSON .*; and 4 more\.$"):
        read_questions(ask(tmp_path, *["x"] * 14))


def test_bytes_that_are_no_text_are_a_malformed_line(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_bytes(b'{"video": "a.mp4", "question": "?"}\r\n\xff\xfe\n')
    with pytest.raises(BatchError, match="line 2 is not JSON"):
        read_questions(file)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"video": "a.mp4", "question": "?"}\r\n')
    assert [question.text for question in read_questions(file)] == ["?"]


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_a_file_without_questions_is_refused(tmp_path, text):
    file = tmp_path / "questions.jsonl"
    file.write_text(text)
    with pytest.raises(BatchError, match="holds no question"):
        read_questions(file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(BatchError, match=r"gone.jsonl cannot be read: No such file"):
        read_questions(tmp_path / "gone.jsonl")


# ---- the file of answers


def test_without_resume_a_file_that_is_there_is_left_alone(tmp_path, questions):
    file = tmp_path / "answers.jsonl"
    file.write_text("precious")
    with pytest.raises(BatchError, match="is there already: give --resume"):
        answer(file, questions, resume=False)
    assert file.read_text() == "precious"


@pytest.mark.parametrize(
    "text",
    ["precious\n", "precious", '{"id": "first"}\n', '{"video": "b.mp4", "question": "one", "id": "first"}\n', "3\n"],
)
def test_a_file_that_is_not_ours_is_never_changed(tmp_path, questions, text):
    file = tmp_path / "answers.jsonl"
    file.write_text(text)
    with pytest.raises(BatchError, match=r"is no file of answers|line 1 is no answer"):
        answer(file, questions)
    assert file.read_text() == text


def test_going_on_after_a_cut_at_any_byte_gives_the_same_file(tmp_path, questions, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a thousand runs of it take their time
    file = tmp_path / "answers.jsonl"
    answer(file, questions)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        log: list[Any] = []
        answer(file, questions, log=log)
        assert file.read_bytes() == whole, length
        done = whole[:length].count(b"\n")
        assert sum(isinstance(entry, tuple) for entry in log) == max(
            0, 4 - done
        )  # the fifth has no video to be asked of


def test_errors_are_tried_again_only_when_asked(tmp_path, questions):
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


def test_a_mended_line_is_answered_when_errors_are_tried_again(tmp_path):
    file = tmp_path / "answers.jsonl"
    answer(file, ask(tmp_path, {"video": "gone.mp4", "question": "one"}, {"video": "a.mp4", "question": "two"}))
    mended = ask(tmp_path, {"video": "b.mp4", "question": "one"}, {"video": "a.mp4", "question": "two"})
    answers = answer(file, mended, retry_errors=True)
    assert answers.failed == set()
    assert sorted(row["text"] for row in found(file)) == ["ONE", "TWO"]


@pytest.mark.parametrize("changed", [{"question": "other"}, {"video": "other.mp4"}, {"id": "other"}])
def test_answers_to_other_questions_are_not_gone_on_with(tmp_path, changed):
    file, line = tmp_path / "answers.jsonl", {"id": 1, "video": "a.mp4", "question": "one"}
    answer(file, ask(tmp_path, line))
    before = file.read_bytes()
    with pytest.raises(BatchError, match="which the questions do not ask: they were changed since"):
        answer(file, ask(tmp_path, line | changed))
    assert file.read_bytes() == before


def test_a_second_answer_to_one_question_is_refused(tmp_path, questions):
    file = tmp_path / "answers.jsonl"
    answer(file, questions)
    first = file.read_bytes().splitlines(keepends=True)[0]
    file.write_bytes(file.read_bytes() + first)
    with pytest.raises(BatchError, match="line 6 answers 'first' a second time"):
        answer(file, questions)


def test_two_runs_do_not_write_one_file(tmp_path, questions):
    file = tmp_path / "answers.jsonl"
    asked = read_questions(questions)
    with Answers(file, asked, resume=True, retry_errors=False) as answers:
        answers.begin()
        with pytest.raises(BatchError, match="is being written by another run"):
            answer(file, questions)
    assert len(answer(file, questions).answered) == 3


def test_nothing_is_written_before_a_run_begins(tmp_path, questions):
    file = tmp_path / "answers.jsonl"
    with Answers(file, read_questions(questions), resume=False, retry_errors=False):
        assert not file.exists()
    answer(file, questions)
    torn = file.read_bytes()[:-5]
    file.write_bytes(torn)
    with Answers(file, read_questions(questions), resume=True, retry_errors=True):
        assert file.read_bytes() == torn


@pytest.mark.parametrize("name", ["gone/answers.jsonl", "folder"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, questions, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(BatchError, match="cannot be written"):
        answer(tmp_path / name, questions)


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path, questions, monkeypatch):
    file, write, calls = tmp_path / "answers.jsonl", os.write, []

    def full(descriptor: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) == 3:
            return write(descriptor, data[:20])
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left on device") as refusal:
            answer(file, questions)
    assert refusal.value.filename == str(file)
    assert file.read_bytes().count(b"\n") == 2
    assert len(answer(file, questions).answered) == 3


KILLED = """
import os, random, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import test_questions_file

folder, mode, write = Path(sys.argv[2]), sys.argv[3], os.write
left = 0

def moment(*event):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def slowly(descriptor, data):  # so that a kill finds lines half written
    moment()
    return write(descriptor, data[:16])

rng, kills, torn = random.Random(mode), 0, 0
while True:
    at = rng.randrange(40, 120 + 20 * kills)
    child = os.fork()
    if not child:
        os.write, left = slowly, at
        sys.addaudithook(moment)  # of opening, renaming, removing, ...
        test_questions_file.answer(folder / "answers.jsonl", folder / "questions.jsonl", retry_errors=mode == "retry")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    kills += 1
    file = folder / "answers.jsonl"
    torn += file.exists() and not file.read_bytes().endswith(b"\\n")
    assert kills < 100
print(kills, torn)
"""


@pytest.mark.subprocess
@pytest.mark.parametrize("mode", ["resume", "retry"])
def test_killed_at_random_moments_each_question_is_answered_once(tmp_path, mode):
    file = tmp_path / "answers.jsonl"
    lines = [{"video": f"{n % 3}.mp4", "question": "bad" if n % 7 == 0 else f"number {n}", "id": n} for n in range(40)]
    ask(tmp_path, *lines)
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path), mode]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills, torn = map(int, done.stdout.split())
    assert kills > 3
    assert torn > 0
    assert Counter(row["id"] for row in found(file)) == Counter(range(40))
    assert {row["id"] for row in found(file) if "error" in row} == set(range(0, 40, 7))


def test_an_error_to_a_question_that_was_changed_is_not_gone_on_with(tmp_path):
    file, line = tmp_path / "answers.jsonl", {"id": 1, "video": "a.mp4", "question": "bad"}
    answer(file, ask(tmp_path, line))
    with pytest.raises(BatchError, match="which the questions do not ask: they were changed since"):
        answer(file, ask(tmp_path, line | {"question": "good"}))
