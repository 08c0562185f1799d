"""The contact sheet and the page: what they show, that they hold together, and that nothing is half-written."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from films import numbered, numbers, with_sound, write
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tieredkv
from tieredkv.errors import OptionError, VideoError
from tieredkv.evidence import page as evidence_page
from tieredkv.evidence import strip
from tieredkv.evidence.moments import Evidence, find_moments
from tieredkv.evidence.page import Shown, moment_frames, page, save_evidence, scaled
from tieredkv.evidence.sheet import draw
from tieredkv.session.results import Generation

ATTACK = '</title><script src="http://evil.example/x.js">alert(1)</script> & $title ${x} "'


def evidence(peaks: dict[int, float], steps: int = 40, start: float = 0.0, step: float = 0.5) -> Evidence:
    heat = torch.zeros(steps)
    for place, value in peaks.items():
        heat[place] = value
    end = start + steps * step
    return Evidence(find_moments(heat, start, end, step), heat, start, end, step)


def answer(text: str = "red", made: Evidence | None = None) -> Generation:
    made = evidence({4: 1.0, 30: 0.5}) if made is None else made
    return Generation(text, [1], None, evidence=made)


def pictures(count: int, width: int = 64, height: int = 48) -> list[Image.Image]:
    return [Image.fromarray(np.full((height, width, 3), 20 * i, np.uint8)) for i in range(count)]


# ---- times, ticks, columns, labels


def test_a_span_holds_its_moment_and_has_hours_on_both_sides_or_none():
    (found,) = evidence({4: 1.0}, start=3597.0)
    assert (found.start, found.end) == (3599.0, 3599.5)
    assert strip.span(found, "-") == "0:59:59-1:00:00"


@given(st.floats(0, 1e5), st.floats(0.5, 4e5))
def test_ticks_are_few_and_inside(start, length):
    made = strip.ticks(start, start + length)
    assert len(made) <= strip.MOST_TICKS + 1
    assert all(start - 1e-3 <= time <= start + length + 1e-3 for time, _ in made)
    assert len({text for _, text in made}) == len(made)
    assert len(made) >= 2 or length < 20


@given(st.lists(st.floats(0, 1000), max_size=12), st.floats(5, 200))
def test_labels_stand_apart_inside_and_in_order(places, width):
    made = strip.spread(places, width, 0, 1000)
    wide = min(width, 1000 / max(1, len(places)))
    centres = sorted(made)
    assert all(after - before >= wide - 1e-6 for before, after in itertools.pairwise(centres))
    assert all(wide / 2 - 1e-6 <= centre <= 1000 - wide / 2 + 1e-6 for centre in made)
    assert [places[i] for i in np.argsort(made, kind="stable")] == sorted(places)


def test_a_label_alone_stands_at_its_place():
    assert strip.spread([300.0, 700.0], 30, 0, 1000) == [300.0, 700.0]


def test_no_peak_is_lost_however_many_steps_share_a_column():
    made = strip.columns(evidence({777: 1.0, 5000: 0.5}, steps=7200), 100, least=3)
    assert (max(made), sorted(set(made))) == (1.0, [0.0, 0.5, 1.0])
    assert made.count(1.0) == 3
    assert strip.columns(evidence({}), 10, least=3) == [0.0] * 10


# ---- frames


def test_frames_are_those_of_the_moments_peaks(tmp_path):
    film = write(tmp_path / "film.mp4", numbered(40), bf="0", g="10")  # ten a second
    made = evidence({4: 1.0, 7: 0.5}, steps=8, start=0.0)
    assert [moment.peak for moment in made] == [2.25, 3.75]
    assert numbers(np.asarray(frame) for frame in moment_frames(made, film)) == [22, 37]
    frames = list(np.stack(numbered(40)))
    assert numbers(np.asarray(frame) for frame in moment_frames(made, frames, source_fps=10)) == [22, 37]


def test_frames_of_a_picture_that_begins_late_are_found_by_the_files_clock(tmp_path):
    film = with_sound(tmp_path / "film.mp4", numbered(40), begin=5, rate=10)
    made = evidence({4: 1.0, 7: 0.5}, steps=8, start=5.0)
    assert [moment.peak for moment in made] == [7.25, 8.75]
    assert numbers(np.asarray(frame) for frame in moment_frames(made, film)) == [22, 37]


@pytest.mark.parametrize("size", [(28, 28), (3840, 2160), (1080, 1920), (2000, 20)])
def test_a_frame_of_any_size_is_fitted(size):
    made = scaled(Image.new("RGB", size), 400, 300)
    assert made.width <= 400
    assert made.height <= 300
    assert made.width == 400 or made.height == 300


# ---- the sheet


@pytest.mark.parametrize("size", [(28, 28), (1920, 1080), (1080, 1920), (2000, 20), (20, 2000)])
@pytest.mark.parametrize("count", [0, 1, 3, 12])
def test_a_sheet_holds_every_moment_in_any_shape(size, count):
    made = evidence({3 * i: 1.0 for i in range(count)})
    frames = [Image.new("RGB", size, (0, 200 + i, 0)) for i in range(count)]
    sheet = draw(Shown("what ?", "red", made, frames, "film.mp4"))
    assert sheet.width == 1600
    assert sheet.height < 4000
    seen = {colour for _, colour in sheet.getcolors(10**7)}
    assert {(0, 200 + i, 0) for i in range(count)} <= seen


def test_a_long_question_is_cut_and_a_long_word_broken():
    def tall(question, said):
        return draw(Shown(question, said, evidence({4: 1.0}), None, "")).height

    assert tall("why " * 2000, "no " * 2000) == tall("why " * 3000, "n" * 9000)


# ---- the page


class Checker(HTMLParser):
    """Collects what a page holds; fails where a tag is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "data", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


def test_a_page_needs_nothing_but_itself_and_runs_nothing():
    made = checked(page(Shown(ATTACK, ATTACK, evidence({4: 1.0, 30: 0.5}), pictures(2), ATTACK)))
    assert all(value.startswith(("data:image/jpeg;base64,", "#moment-")) for value in made.loads)
    assert made.seen.count("img") == 2
    assert not {"script", "link", "iframe", "object"} & set(made.seen)
    assert ATTACK in "".join(made.words)


def test_a_page_shows_question_answer_times_and_weights():
    made = checked(page(Shown("what ?", "red", evidence({4: 1.0, 30: 0.6}, start=60), pictures(2), "film.mp4")))
    words = " ".join(made.words)
    for text in ("what ?", "red", "1:02", "1:15", "62 %", "38 %", "film.mp4", "1:00 to 1:20"):
        assert text in words


def test_without_frames_times_are_shown_and_why_there_are_none():
    made = checked(page(Shown("what ?", "red", evidence({4: 1.0}), None, "")))
    assert "img" not in made.seen
    assert "no frames, as the video was not at hand" in " ".join(made.words)
    assert "rect" in made.seen


def test_where_nothing_stands_out_a_page_says_so():
    assert "No moment stands out." in page(Shown("what ?", "red", evidence({}), None, ""))


# ---- files


@pytest.mark.parametrize("name", ["out.png", "out.html", "OUT.PNG"])
def test_both_kinds_are_written_from_an_answer(tmp_path, name):
    path = save_evidence(answer("r\x1b[0m\ud800\n\u202eed"), tmp_path / name, question=ATTACK, video=None)
    if name.lower().endswith("png"):
        with Image.open(path) as picture:
            assert picture.size[0] == 1600
    else:
        assert "\x1b" not in path.read_text(encoding="utf-8")
    assert [found.name for found in tmp_path.iterdir()] == [name]


def test_a_bad_target_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "folder.png").mkdir()
    bad = {"x.jpg": "ends in .png or .html", "folder.png": "is a folder", "gone/x.png": "there is no folder"}
    bad |= {"n" * 300 + ".png": "cannot be written"}
    for name, message in bad.items():
        with pytest.raises(OptionError, match=message):
            save_evidence(answer(), tmp_path / name)
    with pytest.raises(OptionError, match="ask with evidence=True"):
        save_evidence(Generation("red", [1], None), tmp_path / "x.png")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "out.html"
    path.write_text("old")

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OptionError, match=r"cannot be written \(No space left on device\)"):
        save_evidence(answer(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_video_that_cannot_be_read_leaves_no_file(tmp_path):
    with pytest.raises(VideoError):
        save_evidence(answer(), tmp_path / "out.png", video=__file__)
    assert list(tmp_path.iterdir()) == []


def test_a_page_is_made_where_ascii_is_the_locale(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *given: "ascii")
    path = save_evidence(answer("красный"), tmp_path / "out.html", question="桌子上有什么")
    assert "красный" in path.read_text(encoding="utf-8")


# ---- the command


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    from tieredkv.tiny.scene import make_scene
    from tieredkv.tiny.video import write_video

    return write_video(make_scene(1_000_001, 30, 4), tmp_path_factory.mktemp("film") / "film.mp4")


@pytest.mark.model
def test_the_command_writes_a_page_with_frames_and_without_the_video_one_without(film, tmp_path, monkeypatch, capsys):
    from command_line import run

    kept, question = tmp_path / "film.tkv", "what colour was the star ?"
    tail = ["--session", str(kept), "--max-new-tokens", "4"]
    with_frames, without = tmp_path / "with.html", tmp_path / "without.html"
    code, first, _ = run(monkeypatch, capsys, "ask", str(film), question, *tail, "--evidence", str(with_frames))
    assert (code, first.count("\n")) == (0, 1)
    code, again, _ = run(monkeypatch, capsys, "ask", question, *tail, "--evidence", str(without))
    assert (code, again) == (0, first)
    assert checked(with_frames.read_text()).seen.count("img") >= 1
    bare = without.read_text()
    assert "no frames" in bare
    times = r"<figcaption>([^<]+)</figcaption>"
    assert re.findall(times, bare) == re.findall(times, with_frames.read_text())


def test_the_command_refuses_another_kind_of_file_before_any_work(film, tmp_path, monkeypatch, capsys):
    from command_line import run

    monkeypatch.setattr("tieredkv.api.generate", lambda *given, **options: pytest.fail("work was begun"))
    code, out, err = run(monkeypatch, capsys, "ask", str(film), "what ?", "--evidence", str(tmp_path / "out.pdf"))
    assert (code, out) == (2, "")
    assert "give a file name that ends in .png or .html" in err


def test_what_the_page_needs_is_public():
    assert tieredkv.save_evidence is evidence_page.save_evidence


def test_frames_without_their_rate_are_refused(tmp_path):
    with pytest.raises(OptionError, match="source_fps="):
        save_evidence(answer(), tmp_path / "out.png", video=np.zeros((4, 56, 56, 3), np.uint8))
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("name", ["half \ud83d.png", "null \0.html"])
def test_what_is_no_file_name_is_refused_before_anything_is_answered(tmp_path, name):
    with pytest.raises(OptionError, match="cannot be written"):
        evidence_page.check_target(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
