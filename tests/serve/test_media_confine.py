"""A decoder that somebody has taken over can do little: each thing is tried in a confined process."""

from __future__ import annotations

import ctypes
import json
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.subprocess

SCRIPT = """
import ctypes, json, os, socket, sys
from tieredkv.serve.media.confine import confine
from tieredkv.serve.media.limits import Limits
film, other, port = sys.argv[1:]
descriptor = os.open(film, os.O_RDONLY)
confine(Limits(memory=2**30, processor_s=1), descriptor)
done = {}
def attempt(name, action):
    try:
        action()
        done[name] = "done"
    except BaseException as error:
        done[name] = type(error).__name__
attempt("film", lambda: open(film).read())
attempt("other", lambda: open(other).read())
attempt("list", lambda: os.listdir("/etc"))
attempt("write", lambda: open(film + ".new", "w"))
attempt("change", lambda: open(film, "r+"))
attempt("remove", lambda: os.unlink(film))
attempt("run", lambda: os.execv("/bin/true", ["true"]))
attempt("connect", lambda: socket.create_connection(("127.0.0.1", int(port))))
def send():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.sendto(b"out", ("127.0.0.1", int(port)))
attempt("send", send)
attempt("memory", lambda: bytearray(2**31))
attempt("import", lambda: __import__("wsgiref.util"))
print(json.dumps(done), flush=True)
while True: pass
"""


def landlock() -> int:
    return ctypes.CDLL(None).syscall(444, None, 0, 1) if sys.platform == "linux" else 0


def can_leave_the_network() -> bool:
    script = "import ctypes; c = ctypes.CDLL(None); print(c.unshare(0x40000000) and c.unshare(0x50000000))"
    return sys.platform == "linux" and subprocess.check_output([sys.executable, "-c", script]).strip() == b"0"


@pytest.fixture(scope="module")
def confined(tmp_path_factory):
    folder = tmp_path_factory.mktemp("confined")
    film, other = folder / "film", folder / "other"
    film.write_text("film")
    other.write_text("other")
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", SCRIPT, str(film), str(other), str(server.getsockname()[1])]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)


def done(confined):
    return json.loads(confined.stdout)


def test_it_reads_its_film_and_still_imports(confined):
    assert (done(confined)["film"], done(confined)["import"]) == ("done", "done"), confined.stderr


@pytest.mark.skipif(landlock() < 4, reason="this system cannot confine a process so far")
@pytest.mark.parametrize("what", ["other", "list", "write", "change", "remove", "run", "connect"])
def test_it_reads_nothing_else_writes_nothing_runs_nothing_and_connects_to_nobody(confined, what):
    assert done(confined)[what] == "PermissionError"


@pytest.mark.skipif(not can_leave_the_network(), reason="this system does not let a process give up the network")
def test_it_sends_nothing(confined):
    assert done(confined)["send"] == "OSError"


def test_its_memory_is_limited(confined):
    assert done(confined)["memory"] == "MemoryError"


def test_its_processor_time_is_limited(confined):
    assert confined.returncode < 0
