"""Times in answers are found as people and models write them, asked for by family, and linked from the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from command_line import run
from evidence_examples import evidence
from families import BUILD, build
from page_checker import checked

import tieredkv
from tieredkv.batch.questions_file import read_questions
from tieredkv.errors import BatchError, OptionError
from tieredkv.evidence.named_times import NamedTime, named_times
from tieredkv.evidence.save import save_evidence
from tieredkv.models.chat_template import ChatTemplate
from tieredkv.models.families import VIDEO_FAMILIES
from tieredkv.models.timestamps import times_request


def noise(seed: int, frames: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 60, 90, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("at <12.5 seconds> she", [12.5]),
        ("from 1:02 to 01:05", [62, 65]),
        ("1:02:03.5", [3723.5]),
        ("12s, 13.5 s and 14 sec", [12, 13.5, 14]),
        ("in 1920x1080, 3 cups, 4:3 and 10:99", []),
        ("1:02:03:04", []),
        ("5 sandwiches", []),
        ("1 minute 30 seconds, 5 minutes and 3 seconds", [90, 303]),
        ("2 minutes in, and after 1 hour 2 min", [120, 3720]),
        ("0:12: a man; 00:12.5: a dog", [12, 12.5]),
        ("music of the 1960s and 60s", []),
        ("12-15 seconds, from 20 to 25.5 seconds", [12, 15, 20, 25.5]),
    ],
)
def test_times_are_found_as_they_are_written(text, seconds):
    assert [time.seconds for time in named_times(text, 0, 5000)] == seconds


def test_the_whole_second_of_the_first_frame_counts():
    assert [time.seconds for time in named_times("00:12, 00:11", 12.5, 60)] == [12]


def test_a_time_says_where_it_stands():
    assert named_times("At 0:12 and 0:40.", 10, 30) == (NamedTime(12.0, "0:12", 3),)


BARE = ("glm4v", "glm4v_moe")
"""Their prompts write a number without a unit."""


@pytest.mark.parametrize("name", [name for name in BUILD if VIDEO_FAMILIES[name].time_form and name not in BARE])
def test_prompts_write_times_in_the_form_that_is_asked_for(name):
    _, processor = build(name)
    family = VIDEO_FAMILIES[name]
    written = family.opening(processor, 1, 1.0, [12.5]) + family.after(processor, [12.5], None)
    assert any(time.seconds in (12, 12.5) for time in named_times(written + " ", 0, 60))
    assert family.time_form in times_request(ChatTemplate(family, processor))


@pytest.mark.parametrize("name", [name for name in BUILD if not VIDEO_FAMILIES[name].time_form])
def test_a_family_that_is_not_told_times_refuses_by_name(name):
    _, processor = build(name)
    with pytest.raises(OptionError, match=f"'{VIDEO_FAMILIES[name].model_types[0]}', whose prompts do not say"):
        times_request(ChatTemplate(VIDEO_FAMILIES[name], processor))


def test_several_videos_are_refused():
    _, processor = build("qwen3_vl")
    with pytest.raises(OptionError, match="for one video"):
        times_request(ChatTemplate(VIDEO_FAMILIES["qwen3_vl"], processor, media=("video", "video")))


def test_the_question_asks_for_them_and_the_answer_lists_them(monkeypatch):
    model, processor = build("qwen3_vl")
    with tieredkv.open_session(model, noise(1, 20), processor=processor, fps=2, gpu_kv_gb=1) as session:
        monkeypatch.setattr(ChatTemplate, "text", lambda self, ids: "At <3.5 seconds>, not at 90 s.")
        plain = session.ask("When?", max_new_tokens=2)
        asked = session.ask("When?", max_new_tokens=2, timestamps=True)
    assert plain.times is None
    assert "times" not in plain.as_dict()
    assert asked.stats.prompt_tokens > plain.stats.prompt_tokens
    assert asked.as_dict()["times"] == [{"seconds": 3.5, "text": "3.5 seconds", "begin": 4}]


@pytest.mark.parametrize("value", [1, "yes", None])
def test_anything_but_true_and_false_is_refused(value):
    with pytest.raises(OptionError, match="timestamps="):
        tieredkv.generate("nowhere", noise(1, 4), "When?", fps=2, timestamps=value)


def test_a_line_of_run_says_true_or_false(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"video": "a.mp4", "question": "When?", "timestamps": true}')
    assert read_questions(file)[0].options == {"timestamps": True}
    file.write_text('{"video": "a.mp4", "question": "When?", "timestamps": "yes"}')
    with pytest.raises(BatchError, match="timestamps='yes'"):
        read_questions(file)


@dataclass(frozen=True)
class Answer:
    text: str
    evidence: Any
    times: Any = None


def test_the_page_links_each_to_its_frame(tmp_path):
    shown = Answer("At 0:12 and 0:30.", evidence({4: 1.0}), named_times("At 0:12 and 0:30.", 0, 60))
    page = save_evidence(shown, tmp_path / "where.html", question="When?").read_text()
    checked(page)
    assert '<a href="#time-1">0:12</a>, <a href="#time-2">0:30</a>' in page
    assert page.count('id="time-') == 2


def test_frames_of_named_times_are_shown(tmp_path):
    frames = noise(1, 120)
    shown = Answer("0:12", evidence({4: 1.0}), named_times("0:12", 0, 60))
    page = save_evidence(shown, tmp_path / "where.html", video=frames, source_fps=2).read_text()
    assert 'alt="frame at 0:12" src="data:image/jpeg' in page


def test_the_end_of_a_film_shorter_than_half_a_second_shows_its_first_frame(tmp_path):
    shown = Answer("0.4 seconds", evidence({0: 1.0}, steps=1, step=0.4), named_times("0.4 seconds", 0, 0.4))
    page = save_evidence(shown, tmp_path / "where.html", video=noise(1, 2), source_fps=5).read_text()
    assert 'id="time-1"><img' in page


@pytest.mark.model
def test_ask_refuses_them_for_the_bundled_model(monkeypatch, capsys, tmp_path):
    from tieredkv.tiny.scene import make_scene
    from tieredkv.tiny.video import write_video

    film = write_video(make_scene(4, 10, 2), tmp_path / "film.mp4")
    code, out, err = run(monkeypatch, capsys, "ask", str(film), "when ?", "--timestamps", "--max-new-tokens", "2")
    assert (code, out) == (2, "")
    assert "do not say when a frame is shown" in err
