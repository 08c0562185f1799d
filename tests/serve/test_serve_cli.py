"""tieredkv serve as a program: what it refuses, what it answers, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import run

pytest.importorskip("fastapi")

import httpx

from tieredkv.cli.serve import KEY, keys
from tieredkv.errors import OptionError

PACKAGE = Path(__file__).parents[2]
SECRET = "sk-of-the-test"
DEADLINE_S = 90


class Running:
    """A server in a process of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        (folder / "tmp").mkdir(exist_ok=True)
        self.folder = folder
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TIEREDKV_")},
            "PYTHONPATH": str(PACKAGE),
            "TMPDIR": str(folder / "tmp"),
            "OMP_NUM_THREADS": "1",
            KEY: SECRET,
        }
        command = [sys.executable, "-m", "tieredkv", "serve", "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder)
        self.said: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(DEADLINE_S), "".join(self.said)
        (url,) = re.findall(r"ready: (http\S+)/", "".join(self.said)) or [""]
        assert url, "".join(self.said)
        self.client = httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {SECRET}"})

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if "ready: " in line:
                self._ready.set()
        self._ready.set()

    def end(self, *signals: int) -> int:
        """Send signals; the exit code."""
        for number in signals:
            self.process.send_signal(number)
        code = self.process.wait(DEADLINE_S)
        self._reader.join(5)
        self.client.close()
        return code

    def body(self, **fields) -> dict:
        about = self.client.get("/v1/tieredkv").json()
        parts = [
            {"type": "video_url", "video_url": {"url": about["demo"]["file_id"]}},
            {"type": "text", "text": about["demo"]["questions"][0]},
        ]
        return {"model": about["model"], "messages": [{"role": "user", "content": parts}], **fields}


@contextmanager
def server(folder: Path, *options: str) -> Iterator[Running]:
    running = Running(folder, *options)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def documented(url: str) -> str:
    """The client of docs/serving.md, for this server."""
    (block,) = re.findall(r"```python\n(.*?)```", (PACKAGE / "docs" / "serving.md").read_text(), re.DOTALL)
    return block.replace("http://127.0.0.1:8000", url.rstrip("/")).replace('api_key="none"', f'api_key="{SECRET}"')


@pytest.mark.subprocess
@pytest.mark.model
def test_a_server_of_the_toy_from_start_to_end(tmp_path, monkeypatch, capsys):
    """What the README promises: the page, the demo's film, moments. SIGTERM lets the last answer end, and
    nothing stays."""
    with server(tmp_path) as running:
        assert "no -m: the bundled toy model answers" in "".join(running.said)
        client = running.client
        page = client.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        first = client.post("/v1/chat/completions", json=running.body())
        assert first.status_code == 200, first.text
        assert first.json()["choices"][0]["message"]["content"].strip()
        assert first.json()["tieredkv"]["evidence"]
        assert first.json()["tieredkv"]["reused"] is False
        again = client.post("/v1/chat/completions", json=running.body())
        assert again.json()["tieredkv"]["reused"] is True
        assert again.json()["choices"] == first.json()["choices"]
        assert client.get("/v1/models", headers={"Authorization": "Bearer x"}).status_code == 401

        film = client.get(f"/v1/files/{running.body()['messages'][0]['content'][0]['video_url']['url']}/content")
        (tmp_path / "film.mp4").write_bytes(film.content)
        monkeypatch.chdir(tmp_path)
        exec(compile(documented(str(client.base_url)), "serving.md", "exec"), {})
        text, moments = capsys.readouterr().out.splitlines()
        assert text
        assert "'peak'" in moments

        port = client.base_url.port
        command = [sys.executable, "-m", "tieredkv", "serve", "--port", str(port)]
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
        second = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert second.returncode == 2
        assert f"port {port} of 127.0.0.1 cannot be used" in second.stderr
        assert len(second.stderr.splitlines()) == 1

        body = running.body(stream=True, tieredkv={"progress": True})
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            running.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert running.end() == 0
    assert list((tmp_path / "tmp").iterdir()) == []
    said = "".join(running.said)
    assert SECRET not in said
    assert "POST /v1/chat/completions 200" in said
    assert "Traceback" not in said


@pytest.mark.subprocess
@pytest.mark.model
def test_a_second_signal_ends_what_runs(tmp_path):
    with server(tmp_path, "--grace", "60") as running:
        body = running.body(stream=True, tieredkv={"progress": True})
        with running.client.stream("POST", "/v1/chat/completions", json=body) as reply:
            assert reply.status_code == 200
            next(reply.iter_lines())
            assert running.end(signal.SIGINT, signal.SIGINT) == 130
    assert list((tmp_path / "tmp").iterdir()) == []
    assert "Traceback" not in "".join(running.said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "lets other machines in without a key"),
        (["--host", "192.0.2.1", "--insecure"], "of 192.0.2.1 cannot be used"),
        (["--host", "no such host", "--insecure"], "is not an address of this machine"),
        (["--port", "70000"], "port=70000 is not valid"),
        (["--videos", "gone"], "--videos gone: there is no such folder"),
        (["--sessions", "gone"], "--sessions gone: there is no such folder"),
        (["--api-key-file", "gone"], "--api-key-file gone cannot be read"),
        (["--api-key", "two words"], "an API key has no characters"),
        (["--queue", "0"], "queue=0 is not valid"),
        (["--timeout", "0"], "timeout=0.0 is not valid"),
        (["--grace", "-1"], "grace=-1.0 is not valid"),
        (["--gpu-kv-gb", "0"], "gpu_kv_gb=0.0 is not valid"),
        (["--fps", "0"], "fps=0.0 is not valid"),
        (["--max-new-tokens", "0"], "max_new_tokens=0 is not valid"),
        (["--fetch-from", "https://a.example"], "is no host to fetch from"),
        (["--allowed-host", "https://a.example"], "is not the name of a host"),
        (["--log-level", "loud"], "log_level='loud' is not valid"),
        (["-m", "/nowhere/model"], "/nowhere/model: no usable model found there"),
        (["--weights", "5bit"], "weights='5bit' is not valid"),
    ],
)
def test_bad_options_are_one_sentence(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, capsys, "serve", *options)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert "two words" not in err


def test_a_port_in_use_is_refused_before_anything_is_loaded(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, _, err = run(monkeypatch, capsys, "serve", "--port", port)
    assert code == 2
    assert err == f"tieredkv: port {port} of 127.0.0.1 cannot be used (Address already in use): give another --port, or 0 for any.\n"  # fmt: skip  # noqa: E501


@pytest.mark.subprocess
def test_without_the_extra_it_says_how_to_install_it_and_other_commands_work(tmp_path):
    script = """
import importlib.util, json, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "fastapi" else real(name, *more)
sys.modules["fastapi"] = sys.modules["uvicorn"] = None
from tieredkv import cli
sys.argv = ["tieredkv", *sys.argv[1:]]
try:
    cli.main()
finally:
    heavy = [name for name in ("torch", "transformers", "av", "starlette", "prometheus_client") if name in sys.modules]
    print(json.dumps(heavy))
"""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}

    def said(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", script, *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    refused = said("serve")
    assert refused.returncode == 2
    assert refused.stderr == 'tieredkv: serve needs fastapi and uvicorn: pip install "tieredkv[serve]".\n'
    assert json.loads(refused.stdout.splitlines()[-1]) == []
    for words in (["policies"], ["serve", "--help"], ["ask", "--help"]):
        assert said(*words).returncode == 0, words


def test_keys_come_from_the_line_the_environment_and_a_file(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("three\n\nfour\n")
    monkeypatch.setenv(KEY, "two")
    assert keys(["one", "two"], tmp_path / "keys") == ("one", "two", "three", "four")
    monkeypatch.delenv(KEY)
    assert keys([], None) == ()
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(OptionError, match="holds no key"):
        keys([], tmp_path / "empty")


def test_the_key_of_the_environment_is_not_shown_by_help(monkeypatch, capsys):
    monkeypatch.setenv(KEY, SECRET)
    code, out, err = run(monkeypatch, capsys, "serve", "--help")
    assert code == 0
    assert SECRET not in out + err
    assert json.dumps(out).count("--api-key") >= 2
