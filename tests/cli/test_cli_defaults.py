"""Where options come from: the command line, then the environment, then the file, then the default."""

from __future__ import annotations

import json

import pytest
from command_line import run

from tieredkv.cli import defaults
from tieredkv.errors import OptionError
from tieredkv.memory.units import GIB


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "tieredkv.toml"


def planned(monkeypatch, capsys, *options: str, of: object = 1000) -> dict:
    code, out, err = run(monkeypatch, capsys, "plan", str(of), "--json", *options)
    assert code == 0, err
    return json.loads(out)


def test_options_precede_the_environment_the_file_and_the_default_in_this_order(monkeypatch, capsys, file):
    assert planned(monkeypatch, capsys)["new_tokens"] == 256
    file.write_text("max_new_tokens = 7\ngpu_kv_gb = 1")
    assert planned(monkeypatch, capsys)["new_tokens"] == 7
    monkeypatch.setenv("TIEREDKV_MAX_NEW_TOKENS", "8")
    assert planned(monkeypatch, capsys)["new_tokens"] == 8
    plan = planned(monkeypatch, capsys, "--max-new-tokens", "9")
    assert plan["new_tokens"] == 9
    assert plan["cap_bytes"] == GIB


def test_every_key_is_an_option_and_a_variable(monkeypatch, capsys, file, short_video):
    values = {
        "model": "tiny",
        "weights": "8bit",
        "gpu_kv_gb": 2,
        "host_kv_gb": 3.5,
        "host_kv_bits": 4,
        "step_overhead": 0.3,
        "ahead": True,
        "policy": "quest",
        "card": "RTX 3060",
    }
    values |= {"fps": 2, "max_frames": 5, "max_pixels": "56x56", "fit": True, "max_new_tokens": 6, "link": "pcie4x8"}
    assert values.keys() == defaults.KEYS.keys()
    file.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items()))
    by_file = planned(monkeypatch, capsys, of=short_video)
    file.unlink()
    for key, value in values.items():
        monkeypatch.setenv(f"TIEREDKV_{key.upper()}", str(value))
    assert planned(monkeypatch, capsys, of=short_video) == by_file
    assert (by_file["fps"], by_file["frames"], by_file["new_tokens"]) == (5 / 30, 5, 6)
    assert by_file["cap_bytes"] == 2 * GIB
    assert (by_file["host_budget_bytes"], by_file["host_bits"]) == (3.5 * GIB, 4)
    assert by_file["step"]["overhead"] == 0.3
    assert by_file["step"]["why_ahead"] in ("asked", "unranked")
    assert (by_file["card"], by_file["link"]) == ("RTX 3060", "pcie4x8")
    assert by_file["quantisation"].startswith("torchao")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu_kv = 1", "'gpu_kv' is not a setting: give one of model, weights, gpu_kv_gb"),
        ('fps = "2"', "fps = '2' is not valid: give a number"),
        ("fps = true", "fps = True is not valid: give a number"),
        ("max_frames = 2.5", "max_frames = 2.5 is not valid: give a whole number"),
        ("max_pixels = true", "max_pixels = True is not valid: give a whole number, or a size in quotes"),
        ("model = 3", "model = 3 is not valid: give text in quotes"),
        ("[ask]\nfps = 2", "'ask' is not a setting"),
        ("fps 2", "is not TOML"),
        (b"\xff", "is not TOML"),
    ],
    ids=str,
)
def test_a_bad_file_is_one_sentence_naming_file_and_key(monkeypatch, capsys, file, text, message):
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, out, err = run(monkeypatch, capsys, "plan", "1000")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith(f"tieredkv: {file}")
    assert message in err


def test_a_bad_variable_is_named(monkeypatch, capsys):
    monkeypatch.setenv("TIEREDKV_FPS", "often")
    code, out, err = run(monkeypatch, capsys, "plan", "1000")
    assert (code, out) == (2, "")
    assert "TIEREDKV_FPS" in err


def test_a_folder_instead_of_the_file_is_refused(file):
    file.mkdir()
    with pytest.raises(OptionError, match="cannot be read: Is a directory"):
        defaults.read(file)


def test_a_relative_xdg_folder_is_ignored(monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", "settings")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(defaults.path()) == "/home/somebody/.config/tieredkv.toml"


def test_a_tilde_in_the_models_path_is_the_home_folder(monkeypatch):
    from tieredkv.cli.options import model_path

    monkeypatch.setenv("HOME", "/home/somebody")
    assert model_path("~/model") == "/home/somebody/model"
    assert model_path("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"


@pytest.mark.model
def test_a_saved_session_keeps_its_sampling_whatever_the_environment_says(monkeypatch, capsys, short_video, tmp_path):
    question, kept = "what colour was the moon ?", str(tmp_path / "film.tkv")
    code, first, _ = run(monkeypatch, capsys, "ask", str(short_video), question, "--fps", "4", "--session", kept)
    assert code == 0
    monkeypatch.setenv("TIEREDKV_FPS", "1")
    assert run(monkeypatch, capsys, "ask", question, "--session", kept)[:2] == (0, first)
