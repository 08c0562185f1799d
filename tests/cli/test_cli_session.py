"""--session: a saved session knows its model and its sampling; what the command line adds must agree."""

from __future__ import annotations

import io
import shutil
import sys

import pytest
from command_line import run

from tieredkv.cli import app
from tieredkv.storage import atomic, tensor_file
from tieredkv.tiny.model import PATH

MOON = "what colour was the moon ?"
FEW = ("--max-new-tokens", "2")

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def film(short_video, tmp_path_factory):
    """A session of a copy of the bundled model, saved by the command line."""
    folder = tmp_path_factory.mktemp("session")
    shutil.copytree(PATH, folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tieredkv", "ask", str(short_video), MOON, "-m", str(folder / "model"), *FEW])
        sys.argv += ["--fps", "4", "--end", "20", "--session", str(folder / "film.tkv")]
        with pytest.raises(SystemExit) as stop:
            app.execute()
    assert not stop.value.code
    return folder / "film.tkv"


@pytest.mark.parametrize("command", ["ask", "chat"])
@pytest.mark.parametrize("options", [[], ["--fps", "4"], ["--end", "20", "--fps", "4.0", "--start", "0"]], ids=str)
def test_a_saved_session_needs_no_model_and_takes_its_own_settings(monkeypatch, capsys, film, command, options):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{MOON}\n"))
    question = [MOON] if command == "ask" else []
    code, out, err = run(monkeypatch, capsys, command, *question, "--session", str(film), *FEW, *options)
    assert code == 0, err
    assert out.strip()
    assert "toy model" not in err


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_other_settings_are_named_with_both_values(monkeypatch, capsys, film, command):
    question = [MOON] if command == "ask" else []
    options = ["--fps", "2", "--max-pixels", "56x56", "--end", "20"]
    code, out, err = run(monkeypatch, capsys, command, *question, "--session", str(film), *options)
    assert (code, out) == (2, "")
    assert (
        "another sampling (fps was 4, is 2; max_pixels was not given, is 3136): leave out --fps, --max-pixels to" in err
    )


def test_the_environment_changes_neither_the_model_nor_the_sampling(monkeypatch, capsys, film):
    monkeypatch.setenv("TIEREDKV_MODEL", "/nowhere/model")
    monkeypatch.setenv("TIEREDKV_FPS", "1")
    code, _, err = run(monkeypatch, capsys, "ask", MOON, "--session", str(film), *FEW)
    assert code == 0, err


def test_a_model_on_the_command_line_is_the_one_that_is_loaded(monkeypatch, capsys, film):
    code, out, err = run(monkeypatch, capsys, "ask", MOON, "--session", str(film), "-m", "/nowhere/model")
    assert (code, out) == (2, "")
    assert "/nowhere/model: no usable model found there" in err
    assert run(monkeypatch, capsys, "ask", MOON, "--session", str(film), "-m", "tiny", *FEW)[0] == 0


def test_a_model_that_was_moved_is_one_sentence(monkeypatch, capsys, film):
    moved = (film.parent / "model").rename(film.parent / "moved")
    try:
        code, out, err = run(monkeypatch, capsys, "ask", MOON, "--session", str(film))
    finally:
        moved.rename(film.parent / "model")
    assert (code, out) == (2, "")
    assert err.count("tieredkv: ") == 1
    assert f"was saved with the model at {film.parent}/model, where there is no folder now" in err


def test_a_file_without_these_records_takes_its_model_from_anywhere(monkeypatch, capsys, film, tmp_path):
    stored = tensor_file.read(film)
    old = {name: part for name, part in stored.manifest.items() if name not in ("source", "sampling")}
    path = tmp_path / "old.tkv"
    tensor_file.write(path, old, {name: stored.tensor(name) for name in stored.names})
    code, out, err = run(monkeypatch, capsys, "ask", MOON, "--session", str(path))
    assert (code, out) == (2, "")
    assert "old.tkv does not name its model: give it (-m on the command line" in err
    code, out, err = run(monkeypatch, capsys, "ask", MOON, "--session", str(path), "--fps", "4")
    assert (code, out) == (2, "")
    assert "old.tkv does not say how its video was sampled: leave out --fps." in err
    monkeypatch.setenv("TIEREDKV_MODEL", "tiny")
    assert run(monkeypatch, capsys, "ask", MOON, "--session", str(path), *FEW)[0] == 0


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_a_disk_without_room_for_the_session_is_refused_before_the_ingest(
    monkeypatch, capsys, short_video, tmp_path, command
):
    usage = atomic.shutil.disk_usage("/")
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage._replace(free=2**19))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{MOON}\n"))
    question = [MOON] if command == "ask" else []
    options = ["-m", "tiny", "--fps", "4", "--session", str(tmp_path / "new.tkv")]
    code, out, err = run(monkeypatch, capsys, command, str(short_video), *question, *options)
    assert (code, out) == (2, "")
    assert "new.tkv needs" in err
    assert f"of disk, 512 KiB free in {tmp_path}: free some, or save elsewhere." in err
    assert "ingest:" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_a_disk_that_is_full_at_the_end_leaves_the_answer_and_nothing_else(
    monkeypatch, capsys, short_video, tmp_path, command
):
    def full(content, part, metadata):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "save_file", full)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{MOON}\n"))
    question = [MOON] if command == "ask" else []
    options = ["-m", "tiny", "--fps", "4", "--session", str(tmp_path / "new.tkv"), *FEW]
    code, out, err = run(monkeypatch, capsys, command, str(short_video), *question, *options)
    assert code == 1
    assert len(out.splitlines()) == 1
    assert f"tieredkv: {tmp_path}/new.tkv could not be written: No space left on device." in err.splitlines()
    assert not (tmp_path / "new.tkv").exists()
    assert not list(tmp_path.glob("*.part"))
