"""Evidence as a file, from an answer and by the command line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from evidence_examples import ATTACK, evidence
from page_checker import checked
from PIL import Image

from tieredkv.errors import OptionError, OutputError, VideoError
from tieredkv.evidence.moments import Evidence
from tieredkv.evidence.save import save_evidence
from tieredkv.evidence.target import check_target
from tieredkv.session.results import Generation


def answer(text: str = "red", made: Evidence | None = None) -> Generation:
    made = evidence({4: 1.0, 30: 0.5}) if made is None else made
    return Generation(text, [1], None, evidence=made)


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
    bad = {"folder.png": "is a folder", "gone/x.png": "there is no folder", "n" * 300 + ".png": "File name too long"}
    for name, message in bad.items():
        with pytest.raises(OutputError, match=message):
            save_evidence(answer(), tmp_path / name)
    with pytest.raises(OptionError, match=r"ends in \.png or \.html"):
        save_evidence(answer(), tmp_path / "x.jpg")
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
    with pytest.raises(OutputError, match="could not be written: No space left on device"):
        save_evidence(answer(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_video_that_cannot_be_read_leaves_no_file(tmp_path):
    with pytest.raises(VideoError):
        save_evidence(answer(), tmp_path / "out.png", video=__file__)
    assert list(tmp_path.iterdir()) == []


def test_a_page_is_written_under_an_ascii_locale(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *given: "ascii")
    path = save_evidence(answer("красный"), tmp_path / "out.html", question="桌子上有什么")
    assert "красный" in path.read_text(encoding="utf-8")


def test_frames_without_their_rate_are_refused(tmp_path):
    with pytest.raises(OptionError, match="source_fps="):
        save_evidence(answer(), tmp_path / "out.png", video=np.zeros((4, 56, 56, 3), np.uint8))
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("name", ["half \ud83d.png", "null \0.html"])
def test_an_invalid_file_name_is_refused_when_checked(tmp_path, name):
    with pytest.raises(OutputError, match="is not a file name"):
        check_target(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.pdf", "give a file name that ends in .png or .html"),
        ("gone/out.png", "cannot be written: there is no folder"),
    ],
)
def test_the_command_refuses_a_bad_target_before_any_work(film, tmp_path, monkeypatch, capsys, name, message):
    from command_line import run

    monkeypatch.setattr("tieredkv.api.new_session", lambda *given, **options: pytest.fail("work began"))
    code, out, err = run(monkeypatch, capsys, "ask", str(film), "what ?", "--evidence", str(tmp_path / name))
    assert (code, out) == (2, "")
    assert message in err
