"""ask and chat with --session: an ingest that was interrupted goes on when the command is given again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from command_line import run

from tieredkv.config import TierConfig
from tieredkv.session import checkpoint
from tieredkv.session.beside import checkpoint_path, locked
from tieredkv.storage import tensor_file

pytestmark = pytest.mark.model

STOPPED = """
import os, signal, sys
from tieredkv import cli
from tieredkv.config import TierConfig
from tieredkv.session import checkpoint

TierConfig.__init__.__kwdefaults__["prefill_chunk"] = 64
write, written = checkpoint.Checkpoint.write, []

def writing(self, *args):
    write(self, *args)
    written.append(1)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.Checkpoint.write = writing
checkpoint.is_due = lambda *seconds: True
cli.main()
"""


@pytest.fixture
def command(short_video, monkeypatch):
    """Ingests in calls of 64 tokens, so that a short film takes several."""
    monkeypatch.setitem(TierConfig.__init__.__kwdefaults__, "prefill_chunk", 64)
    question = "what colour was the moon ?"
    options = ("-m", "tiny", "--fps", "4", "--gpu-kv-gb", "0.003", "--max-new-tokens", "2", "--session")
    return ["ask", str(short_video), question, *options]


def tensors(path):
    stored = tensor_file.read(path)
    return {name: stored.tensor(name) for name in stored.names}


@pytest.mark.subprocess
def test_a_command_that_was_killed_goes_on_where_it_was(command, tmp_path, monkeypatch, capsys):
    saved, script = tmp_path / "film.tkv", tmp_path / "stopped.py"
    script.write_text(STOPPED)
    process = subprocess.run(
        [sys.executable, str(script), *command, str(saved)], capture_output=True, text=True, check=False
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert_goes_on(command, saved, monkeypatch, capsys)


def test_a_command_that_was_interrupted_goes_on_where_it_was(command, tmp_path, monkeypatch, capsys):
    saved, write, written = tmp_path / "film.tkv", checkpoint.Checkpoint.write, []

    def writing(self, *args):
        write(self, *args)
        written.append(1)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "write", writing)
        patch.setattr(checkpoint, "is_due", lambda *seconds: True)
        assert run(patch, capsys, *command, str(saved))[0] == 130
    assert_goes_on(command, saved, monkeypatch, capsys)


def assert_goes_on(command, saved, monkeypatch, capsys):
    """The same command ends the ingest, with the answer and the cache of one that was not stopped."""
    other = saved.with_name("other.tkv")
    assert not saved.exists()
    code, out, err = run(monkeypatch, capsys, *command, str(saved))
    assert code == 0, err
    assert "tieredkv: continuing at 0:" in err
    assert not checkpoint_path(saved).exists()
    assert run(monkeypatch, capsys, *command, str(other))[1] == out
    before, after = tensors(other), tensors(saved)
    assert {key for key in before if not torch.equal(before[key], after[key])} == set()


def test_a_film_that_another_process_ingests_is_refused_before_anything_is_loaded(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("tieredkv.api.new_session", None)  # not reached
    folder = locked(checkpoint_path(tmp_path / "film.tkv"))
    code, out, err = run(monkeypatch, capsys, *command, str(tmp_path / "film.tkv"))
    folder.close()
    assert (code, out) == (2, "")
    assert "film.tkv.checkpoint is in use by another process" in err


def test_the_checkpoint_of_a_saved_session_is_removed(command, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "film.tkv"
    assert run(monkeypatch, capsys, *command, str(saved))[0] == 0
    assert os.listdir(tmp_path) == ["film.tkv"]
    folder = locked(checkpoint_path(saved))
    (folder.path / "state").write_bytes(b"left by a process that was killed after it had saved the session")
    folder.close()
    assert run(monkeypatch, capsys, "ask", "what was it ?", "--session", str(saved), "--max-new-tokens", "1")[0] == 0
    assert os.listdir(tmp_path) == ["film.tkv"]
