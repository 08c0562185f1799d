"""A question about a folder or a glob is asked about each film in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from batch_files import answer, ask, found

from tieredkv.batch.films import films
from tieredkv.batch.questions_file import read_questions
from tieredkv.errors import BatchError
from tieredkv.video.sampling import Sampling


@pytest.fixture
def folder(tmp_path) -> Path:
    """Films and other things, below the folder of the questions."""
    for name in ("b.mp4", "a.MKV", "notes.txt", "._b.mp4", "raw.dat", "more/c.webm"):
        file = tmp_path / "films" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "films" / "folder.mp4").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("films", ["films/a.MKV", "films/b.mp4"]),
        ("films/", ["films/a.MKV", "films/b.mp4"]),
        ("films/*", ["films/a.MKV", "films/b.mp4"]),
        ("films/?.mp4", ["films/b.mp4"]),
        ("films/*.dat", ["films/raw.dat"]),
        ("films/**", ["films/a.MKV", "films/b.mp4", "films/more/c.webm"]),
        ("*/[ab].*", ["films/a.MKV", "films/b.mp4"]),
    ],
)
def test_folders_and_globs_stand_for_the_films_in_them(folder, name, expected):
    assert films(name, folder) == expected
    assert films(str(folder / name), Path("elsewhere")) == [str(folder / film) for film in expected]


@pytest.mark.parametrize("name", ["films/b.mp4", "gone.mp4", "", "null\0*", "half \ud83d", "https://host/a.mp4?b=1"])
def test_a_name_of_one_file_stays_one(folder, name):
    assert films(name, folder) is None


def test_a_file_that_is_there_is_not_a_glob(tmp_path):
    (tmp_path / "take [1].mp4").touch()
    assert films("take [1].mp4", tmp_path) is None


@pytest.mark.parametrize("name", ["empty", "films/*.mov", "films/more/*/*"])
def test_no_film_is_an_error_that_says_what_a_film_is(folder, name):
    (folder / "empty").mkdir()
    with pytest.raises(BatchError, match=rf"{name.replace('*', '.')}: there is no film .*\.mp4 "):
        films(name, folder)


def test_each_film_has_an_id_of_its_own(folder):
    asked = ask(folder, {"id": 7, "video": "films", "question": "?"}, {"video": "films/*.mp4", "question": "?"})
    seven, _, other = read_questions(asked)
    assert (seven.id, seven.video, seven.path) == ("7:films/a.MKV", "films/a.MKV", folder / "films/a.MKV")
    assert str(other.id).startswith("2-")
    assert str(other.id).endswith(":films/b.mp4")


def test_an_id_that_a_film_of_an_earlier_line_has_is_refused(folder):
    lines = {"id": "x", "video": "films", "question": "?"}, {"id": "x:films/b.mp4", "video": "c.mp4", "question": "?"}
    with pytest.raises(BatchError, match="line 2 has the id of line 1"):
        read_questions(ask(folder, *lines))


def test_a_folder_without_films_is_the_error_of_its_own_line(folder):
    (folder / "empty").mkdir()
    lines = {"id": 1, "video": "empty", "question": "?"}, {"id": 2, "video": "films/b.mp4", "question": "?"}
    one, two = found(answer(folder / "answers.jsonl", ask(folder, *lines)).file)
    assert "there is no film" in one["error"]
    assert two["text"] == "?"


def test_a_folder_may_change_between_runs(folder):
    """Films that were added are asked about, and answers about films that were removed stay."""
    asked, file = ask(folder, {"id": 1, "video": "films", "question": "?"}), folder / "answers.jsonl"
    for film in (folder / "films/a.MKV", folder / "films/b.mp4"):
        film.rename(folder / film.name)
    answer(file, asked)
    (folder / "b.mp4").rename(folder / "films/b.mp4")
    log: list = []
    assert answer(file, asked, retry_errors=True, log=log).failed == set()
    (folder / "films/b.mp4").rename(folder / "films/c.mp4")
    answer(file, asked, log=log)
    assert [row["video"] for row in found(file)] == ["films/b.mp4", "films/c.mp4"]
    assert log == ["b.mp4", ("?", {"max_new_tokens": 9}), "closed", "c.mp4", ("?", {"max_new_tokens": 9}), "closed"]


def test_an_answer_to_another_question_about_a_removed_film_is_refused(folder):
    file = folder / "answers.jsonl"
    (folder / "films/a.MKV").unlink()
    answer(file, ask(folder, {"id": 1, "video": "films", "question": "one"}))
    (folder / "films/b.mp4").unlink()
    with pytest.raises(BatchError, match="which is not among the questions"):
        answer(file, ask(folder, {"id": 1, "video": "films", "question": "other"}))


def test_one_subtitle_file_for_several_films_is_refused(folder):
    file = ask(folder, {"video": "films", "question": "Who ?", "subtitles": "film.srt"})
    with pytest.raises(BatchError, match="line 1 has one subtitle file for 2 films: give each film a line, or 'auto'"):
        read_questions(file)
    file = ask(folder, *({"video": f"films/{name}", "question": "Who ?"} for name in ("a.MKV", "b.mp4", "b.mp4")))
    with pytest.raises(
        BatchError, match=r"film would be the subtitles of 2 films in .*: give 'auto', or each line its"
    ):
        read_questions(file, Sampling(subtitles="film"))
    assert len(read_questions(file, Sampling(subtitles="auto"))) == 3


def test_one_subtitle_file_for_a_glob_of_one_film_is_that_films(folder):
    file = ask(folder, {"video": "films/*.mp4", "question": "Who ?", "subtitles": "film.srt"})
    assert [question.sampling.subtitles for question in read_questions(file)] == [str(folder / "film.srt")]
