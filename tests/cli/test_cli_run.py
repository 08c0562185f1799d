"""tieredkv run, on the bundled model."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from command_line import run
from helpers import assert_same_moments

import tieredkv

SHAPES = ("moon", "fish", "cup", "triangle")


@pytest.fixture
def questions(tmp_path, short_video) -> Path:
    """Four about one video, one of them empty, and one about none."""
    rows = [{"id": shape, "video": str(short_video), "question": f"what colour was the {shape} ?"} for shape in SHAPES]
    rows[1]["question"] = " "
    rows.insert(1, {"id": "none", "video": "gone.mp4", "question": "what ?"})
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rows(file: Path) -> dict[str, dict]:
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: row for row in found}


@pytest.mark.model
def test_answers_are_those_of_ask_and_what_fails_makes_the_exit_code_1(
    monkeypatch, capsys, questions, short_video, tmp_path
):
    file = tmp_path / "answers.jsonl"
    arguments = ["run", str(questions), "-o", str(file), "--fps", "4"]
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out) == (1, "")
    assert err.count("\ningest: ") == 1
    assert err.splitlines()[-1] == f"{file}: 3 answered, 2 failed: --resume --retry-errors asks again."
    answers = rows(file)
    assert answers["none"]["error"].endswith("gone.mp4: no such file.")
    assert "the prompt is empty" in answers["fish"]["error"]
    with tieredkv.open_session(tieredkv.tiny.model.PATH, short_video, fps=4) as session:
        for shape in ("moon", "cup", "triangle"):
            answer = session.ask(f"what colour was the {shape} ?").as_dict()
            for name in ("text", "token_ids"):
                assert answers[shape][name] == answer[name]
            assert_same_moments(answers[shape]["evidence"], answer["evidence"])
            assert answers[shape].keys() == {"id", "video", "question"} | answer.keys()


@pytest.mark.model
def test_resuming_a_finished_run_loads_nothing(monkeypatch, capsys, questions, tmp_path):
    file = tmp_path / "answers.jsonl"
    arguments = ["run", str(questions), "-o", str(file)]
    run(monkeypatch, capsys, *arguments)
    before = file.read_bytes()

    def not_again(*anything):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("tieredkv.models.loading.load", not_again)
    code, _, err = run(monkeypatch, capsys, *arguments, "--resume")
    assert code == 1  # failed questions still have no answer
    assert "3 answered, 2 failed" in err
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-m", "/nowhere/model"], "no usable model found there"),
        (["--fps", "0"], "fps=0.0 is not valid"),
        (["--gpu-kv-gb", "0"], "gpu_kv_gb=0.0 is not valid"),
        (["--policy", "magic"], "policy='magic' is not valid"),
        (["--max-new-tokens", "0"], "max_new_tokens=0 is not valid"),
        (["--retry-errors"], "give --resume too"),
        (["-o", "-", "--resume"], "give -o a file, not stdout"),
        (["--start", "5", "--end", "4"], "end=4.0 is not valid"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_options_are_refused_before_anything_is_written(monkeypatch, capsys, questions, tmp_path, options, message):
    before = sorted(tmp_path.iterdir())
    code, out, err = run(monkeypatch, capsys, "run", str(questions), "-o", str(tmp_path / "answers.jsonl"), *options)
    assert (code, out) == (2, "")
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


def test_malformed_questions_are_refused_before_anything_is_written(monkeypatch, capsys, tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"video": "a.mp4", "question": "?"}\n{"video": "a.mp4"}\n')
    file = tmp_path / "answers.jsonl"
    code, out, err = run(monkeypatch, capsys, "run", str(tmp_path / "questions.jsonl"), "-o", str(file))
    assert (code, out) == (2, "")
    assert 'questions.jsonl: line 2 has no "question" that is text.' in err
    assert not file.exists()


def test_an_existing_output_is_refused_and_unchanged(monkeypatch, capsys, questions, tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text("precious")
    code, _, err = run(monkeypatch, capsys, "run", str(questions), "-o", str(file))
    assert code == 2
    assert "give --resume" in err
    assert file.read_text() == "precious"


@pytest.mark.model
def test_half_a_character_is_the_error_of_its_own_line(monkeypatch, capsys, short_video, tmp_path):
    film, odd = str(short_video), os.fsdecode(b"caf\xe9.mp4")
    (tmp_path / odd).symlink_to(short_video)
    asked = [
        {"id": "before", "video": film, "question": "what colour was the moon ?"},
        {"id": "half \ud83d", "video": film, "question": "what colour was the \ud83d"},
        {"id": "null", "video": film, "question": "what\0"},
        {"id": "no name", "video": "half \ud83d.mp4", "question": "what colour was the moon ?"},
        {"id": "odd name", "video": odd, "question": "what colour was the moon ?"},
        {"id": "after", "video": film, "question": "what colour was the fish ?"},
    ]
    file, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    code, _, err = run(monkeypatch, capsys, "run", str(file), "-o", str(out), "--fps", "4")
    assert (code, "Traceback" in err) == (1, False)
    answers = rows(out)
    assert [row["id"] for row in asked if "text" in answers[row["id"]]] == ["before", "odd name", "after"]
    assert "half a character" in answers["half \ud83d"]["error"]
    assert "a null character" in answers["null"]["error"]
    assert "no such file" in answers["no name"]["error"]
    again = run(monkeypatch, capsys, "run", str(file), "-o", str(out), "--fps", "4", "--resume")
    assert (again[0], len(out.read_text().splitlines())) == (1, 6)  # the lines written match their questions


@pytest.mark.model
def test_a_question_that_needs_too_much_is_its_own_error(monkeypatch, capsys, short_video, tmp_path):
    asked = [{"id": n, "video": str(short_video), "question": "what ?", "max_new_tokens": n} for n in (4, 100_000)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    arguments = ["run", str(tmp_path / "questions.jsonl"), "-o", str(tmp_path / "answers.jsonl")]
    code, _, _ = run(monkeypatch, capsys, *arguments, "--gpu-kv-gb", "0.01")
    assert code == 1
    answers = rows(tmp_path / "answers.jsonl")
    assert "text" in answers[4]
    assert "gpu_kv_gb" in answers[100_000]["error"]


@pytest.mark.model
def test_from_stdin_to_stdout(monkeypatch, capsys, short_video, tmp_path):
    """Paths are relative to the current folder; a line chooses its sampling and its evidence; text is not escaped."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "één.mp4").symlink_to(short_video)
    line = {"id": 1, "video": "films", "question": "what colour was the moon ?", "fps": 4}
    asked = [line, line | {"id": 2, "evidence": "tokens"}, line | {"id": 3, "evidence": False, "end": 10}]
    typed = "".join(json.dumps(row) + "\n" for row in asked)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
    code, out, err = run(monkeypatch, capsys, "run", "-", "-o", "-", "--max-new-tokens", "4")
    assert code == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert [row["id"] for row in answers] == ["1:films/één.mp4", "2:films/één.mp4", "3:films/één.mp4"]
    assert "één.mp4" in out
    assert ["token_evidence" in row for row in answers] == [False, True, False]
    assert len(answers[1]["token_evidence"]) == answers[1]["new_tokens"]
    assert answers[0]["evidence"]
    assert_same_moments(answers[1]["evidence"], answers[0]["evidence"])
    assert answers[2]["evidence"] is None
    assert answers[2]["visual_tokens"] < answers[0]["visual_tokens"] == answers[1]["visual_tokens"]
    assert err.count(" to answer: ") == 2
    assert err.splitlines()[-1] == "stdout: 3 answered, 0 failed."


@pytest.mark.model
def test_an_error_line_is_the_sentence_of_ask(monkeypatch, capsys, short_video, tmp_path):
    bad = [
        ("gone.mp4", "what ?", []),
        (str(tmp_path / "no film.mp4"), "what ?", []),
        (str(short_video), " ", []),
        (str(short_video), "what ?", ["--gpu-kv-gb", "1e-5"]),
        (str(short_video), "what ?", ["--start", "3600"]),
    ]
    (tmp_path / "no film.mp4").write_text("text")
    monkeypatch.chdir(tmp_path)
    for video, question, options in bad:
        (tmp_path / "questions.jsonl").write_text(json.dumps({"video": video, "question": question}))
        code, out, _ = run(monkeypatch, capsys, "run", "questions.jsonl", "-o", "-", *options)
        asked, _, err = run(monkeypatch, capsys, "ask", video, question, *options)
        assert (code, asked) == (1, 2)
        assert f"tieredkv: {json.loads(out)['error']}" == err.splitlines()[-1]


@pytest.mark.model
def test_an_interrupt_keeps_the_answers_so_far(monkeypatch, capsys, short_video, tmp_path):
    from tieredkv.session.video_session import VideoSession

    answer = VideoSession.ask

    def interrupted(session, question, **options):
        if question == "stop":
            raise KeyboardInterrupt
        return answer(session, question, **options)

    monkeypatch.setattr(VideoSession, "ask", interrupted)
    rows = [{"video": str(short_video), "question": text} for text in ("what colour was the moon ?", "stop")]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "answers.jsonl"
    code, _, err = run(monkeypatch, capsys, "run", str(tmp_path / "questions.jsonl"), "-o", str(file))
    assert code == 130
    assert err.splitlines()[-1] == "tieredkv: interrupted."
    assert "text" in json.loads(file.read_text())


KILLED = """
import os, signal, sys
import tieredkv.cli

write, lines = os.write, int(sys.argv.pop(1))

def counted(descriptor, data):
    global lines
    lines -= data.startswith(b'{"id"')
    if not lines:
        write(descriptor, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(descriptor, data)

os.write = counted
tieredkv.cli.main()
"""


@pytest.mark.subprocess
@pytest.mark.model
def test_killed_while_the_model_answers_each_question_is_answered_once(monkeypatch, capsys, short_video, tmp_path):
    file = tmp_path / "answers.jsonl"
    asked = [{"video": str(short_video), "question": f"what colour was the {SHAPES[n % 4]} ?"} for n in range(12)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    arguments = ["run", str(tmp_path / "questions.jsonl"), "-o", str(file), "--resume"]
    environment = {**os.environ, "PYTHONPATH": str(Path(tieredkv.__file__).parents[1])}
    command = [sys.executable, "-c", KILLED, "5", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not file.read_bytes().endswith(b"\n")
    assert file.read_bytes().count(b"\n") == 4
    assert run(monkeypatch, capsys, *arguments)[0] == 0
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(answers) == len({row["id"] for row in answers}) == 12
    assert Counter(row["question"] for row in answers) == Counter(row["question"] for row in asked)
    assert len({(row["question"], row["text"]) for row in answers}) == 4
