"""A damaged film with `skip_damaged`: what is missing is kept with the session and said with each answer."""

from __future__ import annotations

import json

import pytest
from command_line import run
from films import numbered, write

import tieredkv
from tieredkv.errors import VideoError

pytestmark = pytest.mark.files

QUESTION = "what colour was the star ?"


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Ten seconds of film, of which the last four or so are missing."""
    path = write(tmp_path_factory.mktemp("film") / "cut.mkv", numbered(100), g="10", bf="0")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    return path


def test_what_is_missing_is_kept_with_the_session_and_its_answers(video_model, processor, cut, tmp_path):
    options = {"gpu_kv_gb": 1, "processor": processor}
    with pytest.raises(VideoError, match="go over what is damaged with skip_damaged"):
        tieredkv.open_session(video_model, cut, fps=2, **options)
    with tieredkv.open_session(video_model, cut, fps=2, skip_damaged=True, **options) as session:
        ((begin, end),) = damaged = session.ingest_stats.damaged
        assert (session.ingest_stats.frames, end) == (-(-begin // 0.5), 10.0)
        answer = session.ask(QUESTION, max_new_tokens=2)
        session.save(tmp_path / "film.tkv")
    assert answer.stats.damaged == answer.evidence.damaged == damaged
    page = tieredkv.save_evidence(answer, tmp_path / "page.html", video=cut).read_text("utf-8")
    assert f"could not be read: 0:0{begin:.1f} to 0:10.0" in page
    with tieredkv.load_session(tmp_path / "film.tkv", video_model, processor=processor, video=cut) as session:
        assert session.ingest_stats.damaged == damaged
        assert session.sampling.skip_damaged


@pytest.mark.model
def test_the_command_line_says_what_is_missing(monkeypatch, capsys, cut, tmp_path):
    ask = ["ask", str(cut), "what ?", "-m", "tiny", "--fps", "1", "--max-new-tokens", "2", "--json"]
    code, out, err = run(monkeypatch, capsys, *ask)
    assert (code, out) == (2, "")
    assert "--skip-damaged" in err
    code, out, err = run(monkeypatch, capsys, *ask, "--skip-damaged")
    assert code == 0, err
    ((begin, end),) = json.loads(out)["damaged"]
    assert f"tieredkv: could not be read: 0:0{begin:.1f} to 0:{end:.1f} ({end - begin:.1f} s); the pi" in err
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"video": str(cut), "question": "what ?"}))
    answers = tmp_path / "answers.jsonl"
    options = ["-m", "tiny", "--fps", "1", "--max-new-tokens", "2", "--skip-damaged"]
    code, _, err = run(monkeypatch, capsys, "run", str(questions), "-o", str(answers), *options)
    assert code == 0, err
    assert json.loads(answers.read_text())["damaged"] == [[begin, end]]
    assert "could not be read" in err
    code, out, err = run(monkeypatch, capsys, "plan", str(cut), "-m", "tiny", "--fps", "1", "--skip-damaged", "--json")
    assert code == 0, err
