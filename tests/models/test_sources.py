"""What `model` names if it is text: wrong names are refused at once, with what to do."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

import tieredkv
from tieredkv.errors import UnsupportedModelError
from tieredkv.models import loading, sources
from tieredkv.models.sources import check_source, is_local
from tieredkv.tiny.model import PATH


@pytest.mark.parametrize(
    "name",
    ["/nowhere/model", "./model", "../model", "~/model", "a/b/c", "model/", "C:\\models\\qwen", "a b", "a--b", ""],
)
def test_what_can_only_be_a_path_is_not_called_a_hub_id(name):
    with pytest.raises(
        UnsupportedModelError, match=r"no usable model found there \(there is no such folder\)"
    ) as refused:
        check_source(name)
    assert "hub" not in str(refused.value)


def test_a_name_below_a_folder_that_is_there_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_source("models/qwen")
    (tmp_path / "models").mkdir()
    with pytest.raises(UnsupportedModelError, match="there is no such folder"):
        check_source("models/qwen")


@pytest.mark.parametrize("reason", ["HF_HUB_OFFLINE is set", "cannot be reached"])
def test_a_hub_id_that_cannot_be_loaded_now_is_refused_at_once(monkeypatch, reason):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", reason.startswith("HF"))
    monkeypatch.setattr(sources, "_reachable", lambda endpoint: False)
    started = time.perf_counter()
    for call in (lambda: tieredkv.plan("nobody/no-model", 100), lambda: loading.load("nobody/no-model")):
        with pytest.raises(
            UnsupportedModelError, match=rf"no such folder, and .*{reason}.*hf download nobody/no-model"
        ):
            call()
    assert time.perf_counter() - started < 2


def test_a_host_without_an_address_is_not_reachable():
    assert not sources._reachable("https://no-such-host.invalid")


def test_offline_a_hub_id_that_was_loaded_before_comes_from_the_cache(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "_reachable", lambda endpoint: False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(tmp_path / file))
    assert is_local("some/model")
    monkeypatch.setattr(sources, "_reachable", lambda endpoint: True)
    assert not is_local("some/model")
    assert is_local(PATH)


def test_gguf_is_refused_by_name(tmp_path):
    (tmp_path / "model-Q4_K_M.gguf").touch()
    for name in ("model.gguf", "someone/Model.GGUF", tmp_path / "model-Q4_K_M.gguf", tmp_path):
        with pytest.raises(UnsupportedModelError, match=r"is in GGUF, llama\.cpp's format.*weights='4bit'"):
            check_source(name)


def test_a_file_and_a_folder_without_a_config_say_so(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"is a file: give the model's folder"):
        check_source(__file__)
    with pytest.raises(UnsupportedModelError, match=r"the folder has no config.json"):
        check_source(tmp_path)


@pytest.mark.parametrize("kind", [7, ["qwen"], {"a": 1}])
def test_a_model_type_that_is_no_text_is_one_short_sentence(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UnsupportedModelError) as refused:
        loading.load_config(tmp_path)
    assert str(refused.value).endswith(f"the model's config is damaged: model_type is {kind!r}, and must be text.")


def test_a_folder_without_a_processor_says_what_to_copy_and_what_python_takes(tmp_path, frames):
    for file in PATH.iterdir():
        if file.name in ("config.json", "model.safetensors"):
            (tmp_path / file.name).symlink_to(file)
    for call in (lambda: tieredkv.plan(tmp_path, frames, fps=4.0), lambda: tieredkv.open_session(tmp_path, frames)):
        with pytest.raises(UnsupportedModelError, match=r"copy its files .* there .*; in Python, processor= gives"):
            call()


@pytest.mark.subprocess
def test_wrong_names_are_refused_without_torch():
    check = (
        "import sys; from tieredkv.models.sources import check_source; from tieredkv.models.quantising import "
        "check_weights; check_source('a/b'); check_weights('4bit'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
