"""A file of questions is refused whole, with every line that is malformed."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import pytest
from batch_files import ask

from tieredkv.batch.questions_file import read_questions
from tieredkv.errors import BatchError
from tieredkv.video.sampling import Sampling


def test_a_missing_id_is_made_from_the_lines_number_and_text(tmp_path):
    line = '{"video": "a.mp4", "question": "same"}'
    one, two = read_questions(ask(tmp_path, line, line))
    assert one.id != two.id
    assert str(one.id).startswith("1-")
    (moved,) = [q for q in read_questions(ask(tmp_path, "", line)) if q.text == "same"]
    assert moved.id == two.id


def test_paths_of_videos_are_relative_to_the_file(tmp_path):
    file = ask(tmp_path, {"video": "films/a.mp4", "question": "?"}, {"video": "/b.mp4", "question": "?"})
    assert [question.path for question in read_questions(file)] == [tmp_path / "films/a.mp4", Path("/b.mp4")]


def test_a_line_sets_any_part_of_the_sampling(tmp_path):
    own = {"fps": 2, "max_frames": 9, "start": 1, "end": 5, "max_pixels": 784, "fit": True}
    own |= {"skip_damaged": True, "subtitles": "auto"}
    lines = [{"video": "a.mp4", "question": "?", **settings} for settings in ({}, own, {"end": None})]
    given = Sampling(fps=1, end=30)
    found = [question.sampling for question in read_questions(ask(tmp_path, *lines), given)]
    assert found == [given, Sampling(**own), Sampling(fps=1)]
    free = {field.name for field in fields(Sampling)} - {"source_fps"}
    assert own.keys() == free


def test_times_may_be_written_as_players_show_them(tmp_path):
    line = {"video": "a.mp4", "question": "?", "start": "1:00", "end": "1:02:03.5"}
    (question,) = read_questions(ask(tmp_path, line))
    assert question.sampling == Sampling(start=60.0, end=3723.5)


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
    '{"video": "a.mp4", "question": "?", "temperature": "hot"}': "temperature='hot' is not valid",
    '{"video": "a.mp4", "question": "?", "top_p": 2}': "top_p=2 is not valid",
    '{"video": "a.mp4", "question": "?", "start": "noon"}': "start='noon' is not valid",
    '{"video": "a.mp4", "question": "?", "fps": 0}': "fps=0 is not valid",
    '{"video": "a.mp4", "question": "?", "fps": NaN}': "fps=nan is not valid",
    '{"video": "a.mp4", "question": "?", "end": 5}': "end=5 is not valid: give seconds after start=8",
    '{"video": "a.mp4", "question": "?", "max_pixels": 1}': "max_pixels=1 is not valid",
    '{"video": "a.mp4", "question": "?", "source_fps": 4}': "has 'source_fps', which a line cannot hold",
    '{"video": "a.mp4", "question": "?", "evidence": "all"}': "evidence='all' is not valid",
    '{"video": "a.mp4", "question": "?", "streamer": 1}': "has 'streamer', which a line cannot hold",
    '{"video": "a.mp4", "question": "?", "id": "x"}': "has the id of line 1",
    "[" * 10_000: "is not JSON",
}


@pytest.mark.parametrize(("line", "message"), MALFORMED.items(), ids=list(MALFORMED.values()))
def test_a_malformed_line_is_refused_with_its_number(tmp_path, line, message):
    file = ask(tmp_path, {"video": "a.mp4", "question": "?", "id": "x"}, "", line)
    with pytest.raises(BatchError) as refusal:
        read_questions(file, Sampling(start=8))
    assert f"line 3 {message.partition('Did')[0].strip()}" in str(refusal.value) or message in str(refusal.value)
    assert "line 3 " in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_all_malformed_lines_are_named_up_to_ten(tmp_path):
    with pytest.raises(BatchError, match=r"line 1 is not JSON .*; line 10 is not JSON .*; and 4 more\.$"):
        read_questions(ask(tmp_path, *["x"] * 14))


def test_bytes_that_are_not_text_are_a_malformed_line(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_bytes(b'{"video": "a.mp4", "question": "?"}\r\n{"video": "b.mp4", "question": "caf\xe9 ?"}\n')
    with pytest.raises(BatchError, match="line 2 is not UTF-8 text"):
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


def test_a_closed_stdin_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(BatchError, match="stdin is closed"):
        read_questions(None)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(BatchError, match=r"gone.jsonl cannot be read: No such file"):
        read_questions(tmp_path / "gone.jsonl")
