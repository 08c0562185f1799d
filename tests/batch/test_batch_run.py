"""All questions are answered, whatever happens to a question, the process or the disk meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from batch_files import answer, ask, found


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


def test_questions_are_grouped_by_video_and_sampling(tmp_path):
    spans = [{}, {"start": 5}, {"fps": 2}, {"start": 5.0}, {}]
    lines = [{"video": "a.mp4", "question": str(n), **span} for n, span in enumerate(spans)]
    log: list[Any] = []
    answer(tmp_path / "answers.jsonl", ask(tmp_path, *lines), log=log)
    assert [entry if isinstance(entry, str) else entry[0] for entry in log] == [
        *("a.mp4", "0", "4", "closed"),
        *("a.mp4", "1", "3", "closed"),
        *("a.mp4", "2", "closed"),
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


def test_text_is_not_escaped(tmp_path, questions):
    answers = answer(tmp_path / "answers.jsonl", questions)
    assert '"text": "ZWEI Ü"'.encode() in answers.file.read_bytes()


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
import batch_files

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
        batch_files.answer(folder / "answers.jsonl", folder / "questions.jsonl", retry_errors=mode == "retry")
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
