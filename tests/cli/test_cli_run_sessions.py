"""tieredkv run --sessions: what one run ingests, later runs find."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from helpers import assert_same_moments

from tieredkv.session.video_session import VideoSession

pytestmark = pytest.mark.model


class Runs:
    """Runs of one question about film.mp4, and how often they ingested it."""

    def __init__(self, monkeypatch, capsys, folder: Path) -> None:
        self.monkeypatch, self.capsys, self.folder = monkeypatch, capsys, folder
        self.ingests, self.err, self.code = 0, "", 0
        ingest = VideoSession.ingest

        def counted(*arguments: Any, **named: Any) -> None:
            self.ingests += 1
            ingest(*arguments, **named)

        monkeypatch.setattr(VideoSession, "ingest", counted)

    def __call__(self, *options: str, video: str = "film.mp4", **fields: Any) -> dict[str, Any]:
        """The answer."""
        line = {"video": video, "question": "what colour was the moon ?", "max_new_tokens": 4, **fields}
        file = self.folder / "questions.jsonl"
        file.write_text(json.dumps(line))
        self.ingests = 0
        arguments = ["run", str(file), "-o", "-", "--sessions", str(self.folder / "kept" / "here"), *options]
        self.code, out, self.err = run(self.monkeypatch, self.capsys, *arguments)
        return json.loads(out)

    @property
    def files(self) -> list[Path]:
        return sorted((self.folder / "kept" / "here").iterdir())


@pytest.fixture
def runs(monkeypatch, capsys, short_video, tmp_path) -> Runs:
    shutil.copy(short_video, tmp_path / "film.mp4")
    return Runs(monkeypatch, capsys, tmp_path)


def test_a_later_run_ingests_nothing_and_answers_alike(runs):
    first = runs("--fps", "4")
    (file,) = runs.files
    assert (runs.ingests, file.name[:5], file.suffix) == (1, "film-", ".tkv")
    again = runs("--fps", "4")
    assert (runs.code, runs.ingests, runs.files) == (0, 0, [file])
    assert f"from {file}" in runs.err
    assert [again[name] for name in ("text", "token_ids")] == [first[name] for name in ("text", "token_ids")]
    assert_same_moments(again["evidence"], first["evidence"])


def test_the_bytes_of_the_film_count_not_its_name(runs):
    runs()
    (runs.folder / "film.mp4").rename(runs.folder / "moved.mp4")
    runs(video="moved.mp4")
    assert runs.ingests == 0
    other = (runs.folder / "moved.mp4").read_bytes() + b"\0" * 8
    (runs.folder / "moved.mp4").write_bytes(other)
    runs(video="moved.mp4")
    assert (runs.ingests, len(runs.files)) == (1, 2)


def test_each_sampling_system_prompt_and_model_has_its_own_file(runs, tmp_path):
    from tieredkv.tiny.model import PATH

    shutil.copytree(PATH, tmp_path / "model")
    for number, (options, fields) in enumerate(
        [
            ([], {}),
            ([], {"fps": 2}),
            (["--system", "Answer."], {}),
            (["-m", str(tmp_path / "model")], {}),
        ],
        1,
    ):
        runs(*options, **fields)
        assert (runs.ingests, len(runs.files)) == (1, number)
    runs("--fps", "2")  # 2.0 is the 2 of the line above
    assert (runs.ingests, len(runs.files)) == (0, 4)


def test_the_subtitles_in_a_file_count_not_its_name(runs, tmp_path):
    file, other = tmp_path / "film.srt", tmp_path / "copy.srt"
    file.write_text("1\n00:00:00,100 --> 00:00:00,900\nthe moon .\n")
    runs(subtitles="film.srt")
    shutil.copy(file, other)
    runs(subtitles="copy.srt")
    assert (runs.code, runs.ingests, len(runs.files)) == (0, 0, 1)
    other.write_text(file.read_text().replace("moon", "cup"))
    runs(subtitles="copy.srt")
    assert (runs.code, runs.ingests, len(runs.files)) == (0, 1, 2)


def test_what_fit_chose_is_reused_under_the_caps_it_was_chosen_for(runs):
    runs("--fit")
    runs("--fit")
    assert (runs.code, runs.ingests) == (0, 0)
    runs("--fit", "--gpu-kv-gb", "2")
    assert (runs.code, runs.ingests, len(runs.files)) == (0, 1, 2)
    runs("--fit", "--gpu-kv-gb", "2", "--host-kv-gb", "1")
    assert (runs.code, runs.ingests, len(runs.files)) == (0, 1, 3)
    runs("--fit", "--gpu-kv-gb", "2", "--host-kv-gb", "1", "--host-kv-bits", "4")
    assert (runs.code, runs.ingests, len(runs.files)) == (0, 1, 4)


def test_settings_of_the_cache_are_those_of_the_run(runs):
    runs("--gpu-kv-gb", "0.001")
    answer = runs()
    assert runs.ingests == 0
    assert answer["kv_cap_bytes"] == 4 * 2**30


def test_a_file_in_other_bits_than_are_asked_for_is_replaced(runs):
    runs("--host-kv-bits", "4")
    runs()
    assert runs.ingests == 0
    runs("--host-kv-bits", "8")
    assert (runs.code, runs.ingests, len(runs.files)) == (0, 1, 1)
    assert "was saved with another number of bits: the video is ingested again" in runs.err


@pytest.mark.parametrize("where", [0.001, 0.6])
def test_a_damaged_file_is_reported_and_replaced(runs, where):
    first = runs()
    (file,) = runs.files
    content = bytearray(file.read_bytes())
    content[int(len(content) * where)] ^= 1
    file.write_bytes(content)
    again = runs()
    assert (runs.code, runs.ingests, runs.files) == (0, 1, [file])
    assert "is damaged" in runs.err
    assert ": the video is ingested again\n" in runs.err
    assert again["text"] == first["text"]


def test_a_file_of_something_else_is_reported_and_replaced(runs):
    runs("--fps", "2")
    (two,) = runs.files
    runs("--fps", "4")
    (four,) = {*runs.files} - {two}
    shutil.copy(two, four)
    runs("--fps", "4")
    assert (runs.ingests, len(runs.files)) == (1, 2)
    assert f"{four} was saved with another sampling: the video is ingested again" in runs.err


def test_a_file_of_another_model_is_reported_and_replaced(runs, tmp_path):
    """The model in a folder has changed since."""
    from tieredkv.tiny.model import PATH

    shutil.copytree(PATH, tmp_path / "model")
    runs("-m", str(tmp_path / "model"))
    file = tmp_path / "model" / "processor_config.json"
    file.write_text(file.read_text().replace("0.48145466", "0.5"))
    runs("-m", str(tmp_path / "model"))
    assert (runs.code, runs.ingests, len(runs.files)) == (0, 1, 1)
    assert "was saved with another " in runs.err


def test_a_film_that_another_run_is_ingesting_is_ingested_without_a_checkpoint(runs):
    from tieredkv.session.beside import checkpoint_path, locked

    runs()
    (file,) = runs.files
    file.unlink()
    other = locked(checkpoint_path(file))
    try:
        assert runs()["text"]
    finally:
        other.remove()
    assert (runs.code, runs.files) == (0, [file])
    assert "without a checkpoint: " in runs.err
    assert "is in use by another process" in runs.err


def test_a_session_that_cannot_be_saved_is_reported_and_its_questions_answered(runs, monkeypatch):
    from tieredkv.errors import SessionError
    from tieredkv.storage import tensor_file

    def full(*arguments):
        raise SessionError("film.tkv could not be written: No space left on device.")

    monkeypatch.setattr(tensor_file, "write", full)
    assert runs()["text"]
    assert "  session not saved: film.tkv could not be written: No space left on device." in runs.err
    assert runs.err.splitlines()[-1] == "stdout: 1 answered, 0 failed; sessions not saved: 1."
    assert runs.code == 1  # as of ask and chat


def test_a_folder_that_cannot_be_one_is_refused(runs, monkeypatch, capsys):
    (runs.folder / "questions.jsonl").write_text('{"video": "film.mp4", "question": "?"}')
    arguments = ["run", str(runs.folder / "questions.jsonl"), "-o", "-", "--sessions"]
    code, out, err = run(monkeypatch, capsys, *arguments, str(runs.folder / "film.mp4"))
    assert (code, out) == (2, "")
    assert "film.mp4 is no folder for sessions: File exists." in err
