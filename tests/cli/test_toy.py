"""Without -m the bundled toy model answers, says so, and takes only films that it knows."""

from __future__ import annotations

import io
import json
import sys

import pytest
from command_line import run
from films import noise, write

from tieredkv.cli.toy import is_demo_film
from tieredkv.errors import VideoError

MOON = "what colour was the moon ?"
LINE = "tieredkv: no -m: the bundled toy model answers, which knows only the films of `tieredkv demo`."

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def own_film(tmp_path_factory):
    return write(tmp_path_factory.mktemp("own") / "holiday.mp4", noise(20, 64, 64))


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands that take a film, by name; the toy would answer each."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{MOON}\n"))

    def of(film) -> dict[str, list[str]]:
        line = {"video": str(film), "question": MOON, "max_new_tokens": 2}
        (tmp_path / "questions.jsonl").write_text(json.dumps(line))
        return {
            "ask": ["ask", str(film), MOON, "--max-new-tokens", "2"],
            "chat": ["chat", str(film), "--max-new-tokens", "2"],
            "run": ["run", str(tmp_path / "questions.jsonl"), "-o", str(tmp_path / "answers.jsonl")],
            "plan": ["plan", str(film)],
        }

    return of


@pytest.mark.parametrize("command", ["ask", "chat", "run", "plan"])
def test_without_a_model_one_line_says_that_the_toy_answers(monkeypatch, capsys, commands, short_video, command):
    code, out, err = run(monkeypatch, capsys, *commands(short_video)[command])
    assert code == 0, err
    plan = LINE.replace("the bundled toy model answers", "this plan is for the bundled toy model")
    assert [row for row in err.splitlines() if "toy model" in row] == [plan if command == "plan" else LINE]
    assert "toy" not in out


@pytest.mark.parametrize("command", ["ask", "chat", "run", "plan"])
def test_a_film_of_ones_own_is_refused_and_says_how_to_go_on(
    monkeypatch, capsys, commands, own_film, tmp_path, command
):
    code, out, err = run(monkeypatch, capsys, *commands(own_film)[command])
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(
        f"tieredkv: {own_film}: without -m only the bundled toy model could answer, and it knows only"
    )
    assert "give a model (-m FOLDER or -m HUB_ID), or ask the toy nevertheless with -m tiny." in line
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize("command", ["ask", "chat", "run", "plan"])
def test_the_toy_by_name_takes_any_film_and_needs_no_line(monkeypatch, capsys, commands, own_film, command):
    code, _, err = run(monkeypatch, capsys, *commands(own_film)[command], "-m", "tiny")
    assert code == 0, err
    assert "toy model" not in err


@pytest.mark.parametrize("place", ["variable", "file"])
def test_the_toy_may_be_named_once_for_all(monkeypatch, capsys, commands, own_film, tmp_path, place):
    if place == "variable":
        monkeypatch.setenv("TIEREDKV_MODEL", "tiny")
    else:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        (tmp_path / "tieredkv.toml").write_text('model = "tiny"')
    code, _, err = run(monkeypatch, capsys, *commands(own_film)["plan"])
    assert (code, err) == (0, "")


def test_a_plan_for_a_number_of_tokens_says_that_it_is_the_toys(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "plan", "5000")
    assert code == 0
    assert out
    assert err.startswith("tieredkv: no -m: this plan is for the bundled toy model")


def test_a_run_goes_on_over_a_film_that_cannot_be_read(monkeypatch, capsys, tmp_path, short_video):
    lines = [{"video": str(video), "question": MOON} for video in (short_video, "gone.mp4", __file__)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, _, err = run(
        monkeypatch, capsys, "run", str(tmp_path / "questions.jsonl"), "-o", str(tmp_path / "answers.jsonl")
    )
    assert code == 1
    assert LINE in err.splitlines()
    assert "1 answered, 2 failed" in err


def test_a_demo_film_is_known_by_its_tag_through_copies_in_other_containers(short_video, own_film, tmp_path):
    import av

    remuxed = tmp_path / "film.mkv"
    with av.open(str(short_video)) as source, av.open(str(remuxed), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        target.metadata.update(source.metadata)
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert is_demo_film(short_video)
    assert is_demo_film(remuxed)
    assert not is_demo_film(own_film)
    with pytest.raises(VideoError, match="no such file"):
        is_demo_film(tmp_path / "gone.mp4")
