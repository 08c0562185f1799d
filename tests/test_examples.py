"""Examples run unchanged on the bundled model, and say what is wrong with bad input in one sentence."""

from __future__ import annotations

import csv
import importlib.util
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tieredkv.tiny.scene import chain_question, colour_question, make_scene
from tieredkv.tiny.video import write_video

FOLDER = Path(__file__).parents[1] / "examples"
ALONE = ("quickstart", "sessions", "text_model")
"""They take no options beside arguments, and run on the bundled model, or on none, without arguments."""
WITH_TINY = ("long_video_qa_24gb", "long_video_qa_12gb", "many_questions", "camera_archive", "compare_policies")
QUESTION = "what colour was the star ?"


@pytest.fixture
def run(film_of_scene, monkeypatch, capsys):
    """Run an example as a script; its stdout."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.setattr(importlib.import_module("little_video"), "write_video", film_of_scene)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(run, capsys):
    """Run an example that ends with exit code 2; the sentence it ends with."""

    def refused(name: str, *arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            run(name, *arguments)
        assert stop.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return refused


@pytest.fixture(scope="module")
def film_of_scene(tmp_path_factory):
    """`write_video`, which writes the film of each scene once."""
    folder = tmp_path_factory.mktemp("films")

    def write(scene, path: Path) -> Path:
        film = folder / f"{scene.seed}.mp4"
        return Path(shutil.copy(film if film.exists() else write_video(scene, film), path))

    return write


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_video(make_scene(1_000_003, 32, 4), tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture(scope="module")
def truth() -> list[str]:
    """Answers to the questions about the video that --tiny makes."""
    scene = make_scene(seed=7, seconds=256, cards=8)
    first, second = (card.shape for card in scene.cards[:2])
    return [" ".join(asked.words) for asked in (colour_question(scene, first), chain_question(scene, second, 3))]


def pretend(monkeypatch, bitsandbytes: object) -> None:
    """Make bitsandbytes seem installed or not."""
    real = importlib.util.find_spec

    def find_spec(name: str, *rest: object) -> object:
        return bitsandbytes if name == "bitsandbytes" else real(name, *rest)

    monkeypatch.setattr("importlib.util.find_spec", find_spec)


def on_tiny(*more: object) -> tuple[object, ...]:
    from tieredkv.tiny import model

    return (*more, "-m", model.PATH, "--fps", 4)


def test_no_example_is_left_out():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*ALONE, *WITH_TINY, "little_video"}


@pytest.mark.model
@pytest.mark.parametrize("name", ALONE)
def test_it_runs_without_arguments(run, name):
    assert "on the device" in run(name)


@pytest.mark.model
@pytest.mark.parametrize("name", WITH_TINY)
def test_it_answers_truly_on_the_bundled_model(run, name, truth):
    printed = run(name, "--tiny")
    assert "on the device" in printed
    for answer in truth:
        assert answer in printed


@pytest.mark.parametrize("name", WITH_TINY)
def test_without_arguments_it_says_what_to_give(refused, name):
    assert "or --tiny." in refused(name)


@pytest.mark.parametrize("name", WITH_TINY)
def test_a_video_beside_tiny_is_refused(refused, name):
    assert "leave them out, or --tiny." in refused(name, "--tiny", "film.mp4")


@pytest.mark.model
@pytest.mark.parametrize("name", ["long_video_qa_24gb", "camera_archive"])
def test_options_beside_tiny_act(refused, name):
    assert "fps=0.0 is not valid" in refused(name, "--tiny", "--fps", 0)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("quickstart", ["film.mp4"], "give a question"),
        ("quickstart", ["gone.mp4", "what ?"], "no such file"),
        ("quickstart", ["--fast"], "unrecognized arguments"),
        ("sessions", ["film.mp4", "film.tkv"], "at least one question"),
        ("sessions", ["gone.mp4", "gone.tkv", "what ?"], "no such file"),
        ("text_model", ["/nowhere/model"], "no usable model found there"),
        ("text_model", ["one", "two"], "unrecognized arguments"),
    ],
)
def test_examples_without_options_refuse_what_they_cannot_use(refused, name, arguments, said):
    assert said in refused(name, *arguments)


def test_a_missing_bitsandbytes_is_reported(refused, monkeypatch):
    pretend(monkeypatch, bitsandbytes=None)
    assert "pip install bitsandbytes" in refused("long_video_qa_12gb", "--tiny", "--quantize", "4bit")


@pytest.mark.model
@pytest.mark.parametrize("name", ["answers.csv", "answers.jsonl"])
def test_many_answers_in_a_file(run, clip, tmp_path, name):
    questions, answers = tmp_path / "questions.txt", tmp_path / name
    questions.write_text(f"{QUESTION}\n\nwhat colour was the moon ?\n")
    run("many_questions", clip, questions, answers, *on_tiny())
    with answers.open(newline="") as file:
        rows = list(csv.DictReader(file)) if name.endswith(".csv") else [json.loads(line) for line in file]
    assert [row["question"] for row in rows] == [QUESTION, "what colour was the moon ?"]
    assert all(row["answer"] and float(row["seconds"]) > 0 for row in rows)


def test_a_file_of_answers_is_not_overwritten(refused, clip, tmp_path):
    questions, answers = tmp_path / "questions.txt", tmp_path / "answers.csv"
    questions.write_text(QUESTION)
    answers.write_text("precious")
    assert "exists already" in refused("many_questions", clip, questions, answers)
    assert answers.read_text() == "precious"


@pytest.mark.model
def test_a_refused_video_leaves_no_file_of_answers(refused, tmp_path):
    questions, answers = tmp_path / "questions.txt", tmp_path / "answers.csv"
    questions.write_text(QUESTION)
    assert "no such file" in refused("many_questions", tmp_path / "gone.mp4", questions, answers, *on_tiny())
    assert not answers.exists()


@pytest.fixture
def archive(clip, tmp_path) -> Path:
    """Two clips, one of them in a subfolder, and a file that is not a video."""
    folder = tmp_path / "clips"
    (folder / "porch").mkdir(parents=True)
    (folder / "a.mp4").write_bytes(clip.read_bytes())
    (folder / "porch" / "b.mp4").write_bytes(clip.read_bytes())
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.model
def test_an_archive_goes_on_past_a_bad_clip_and_after_a_kill(run, archive, tmp_path):
    answers = tmp_path / "answers.jsonl"
    run("camera_archive", archive, answers, QUESTION, *on_tiny())
    first = rows_of(answers)
    assert {row["clip"] for row in first} == {"a.mp4", "broken.mp4", "porch/b.mp4"}
    (bad,) = [row for row in first if "error" in row]
    assert bad["clip"] == "broken.mp4"
    assert "not a readable video" in bad["error"]

    lines = answers.read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"a.mp4"' in line]
    answers.write_text("".join(kept) + '{"clip": "porch/b.mp4", "ans')  # killed in the middle of a line
    printed = run("camera_archive", archive, answers, QUESTION, *on_tiny())
    assert "3 clips, 1 of them already answered" in printed
    assert answers.read_text().startswith(kept[0])
    assert sorted(map(str, rows_of(answers))) == sorted(map(str, first))


@pytest.mark.model
def test_another_question_is_asked_of_clips_answered_before(run, archive, tmp_path):
    answers = tmp_path / "answers.jsonl"
    (archive / "broken.mp4").unlink()
    run("camera_archive", archive, answers, QUESTION, *on_tiny())
    assert "2 clips, 2 of them already answered" in run("camera_archive", archive, answers, QUESTION, *on_tiny())
    assert "2 clips, 0 of them" in run(
        "camera_archive", archive, answers, QUESTION, "what colour was the moon ?", *on_tiny()
    )


@pytest.mark.parametrize("content", ["a letter without an end of line", "a letter\n", '["a list"]\n', "\x00\n"])
def test_a_file_of_something_else_is_left_alone(refused, archive, tmp_path, content):
    answers = tmp_path / "letter.txt"
    answers.write_text(content)
    assert "is not a file of answers" in refused("camera_archive", archive, answers, QUESTION, *on_tiny())
    assert answers.read_text() == content


def test_an_unknown_policy_is_refused_before_anything_is_loaded(refused):
    assert "policy='keep' is not valid" in refused("compare_policies", "--tiny", "--policies", "keep")


def test_four_bits_leave_the_vision_tower_and_the_output_as_they_are(monkeypatch, video_model):
    from transformers.quantizers.quantizers_utils import should_convert_module

    pretend(monkeypatch, bitsandbytes=True)
    skipped = runpy.run_path(str(FOLDER / "long_video_qa_12gb.py"))["four_bits"]().llm_int8_skip_modules
    linear = [name for name, module in video_model.named_modules() if type(module).__name__ == "Linear"]
    converted = {name for name in linear if should_convert_module(name, skipped)}
    assert converted == {name for name in linear if "language_model" in name}
    assert converted
