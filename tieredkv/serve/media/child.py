"""The process that decodes, as seen by the one that asks: started, listened to, killed."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tieredkv
from tieredkv.errors import VideoError
from tieredkv.serve.media import wire
from tieredkv.serve.media.limits import Limits

COMMAND = (sys.executable, "-B", "-m", "tieredkv.serve.media.decoder")
_KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "SYSTEMROOT")
"""Variables of the environment that the process is given: keys and tokens are in others."""
_POKE_S = 0.05
"""Seconds between two calls of `poke`."""
_PIPE = 2**20
"""Bytes that may be on their way."""


class Child:
    """One process, which reads one film. For one thread at a time; killed by `close`."""

    def __init__(self, descriptor: int, request: dict[str, Any], limits: Limits):
        """descriptor: of the film; the caller may close it afterwards. request: what `decoder` reads."""
        self.name, self._limits = request["name"], limits
        path = f"/proc/self/fd/{descriptor}" if sys.platform == "linux" else request["path"]
        text = {**request, "path": path, "descriptor": descriptor, "limits": asdict(limits)}
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",  # else a file beside the server could be taken for a module
            env=_environment(),
            pass_fds=(descriptor,),
            start_new_session=True,  # Ctrl-C is for the server
        )
        assert self._process.stdout is not None
        self._out = self._process.stdout.fileno()
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN)
        _widen(self._out)
        self.ask(json.dumps(text))

    def ask(self, line: str) -> None:
        """Write a line to it. One that has died is noticed at the next `head`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
        except OSError:
            return

    def head(self, poke: Callable[[], None] | None = None) -> tuple[bytes, int]:
        """Kind and size of the next message. poke: called while waiting; may raise. Raises `VideoError` in place of a
        message of failure, or if the process has ended or says nothing for too long."""
        head = bytearray(wire.HEAD.size)
        self.fill(memoryview(head), poke)
        kind, size = wire.HEAD.unpack(head)
        if kind == wire.FAILED:
            raise VideoError(self.text(size).decode("utf-8", "replace"))
        return kind, size

    def text(self, size: int) -> bytes:
        """The content of a message that is no frame."""
        if size > wire.LONGEST_TEXT:
            raise self._broken()
        content = bytearray(size)
        self.fill(memoryview(content))
        return bytes(content)

    def fill(self, view: memoryview, poke: Callable[[], None] | None = None) -> None:
        """Fill `view` with what comes, within the time that one message may take."""
        until = time.monotonic() + self._limits.patience_s
        while view:
            if not self._poll.poll(1000 * _POKE_S):
                if poke is not None:
                    poke()
                if time.monotonic() > until:
                    raise self._hung()
                continue
            if (count := os.readv(self._out, [view])) == 0:
                raise self._ended()
            view = view[count:]
            if view and time.monotonic() > until:  # a byte now and then
                raise self._hung()

    def close(self) -> None:
        """Kill it. May be called twice."""
        process = self._process
        if process.returncode is None:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def _hung(self) -> VideoError:
        return VideoError(
            f"{self.name}: the decoder did nothing for {self._limits.patience_s:g} s and was stopped: re-encode the "
            "file."
        )

    def _ended(self) -> VideoError:
        code = self._process.wait(timeout=5)
        if code == -signal.SIGXCPU:
            why = "took more processor time than one film may"
        elif code < 0:
            why = f"was ended by signal {-code}: the file is damaged, or too large to decode"
        else:
            why = f"ended with code {code}"
        return VideoError(f"{self.name}: the process that decodes it {why}: re-encode the file.")

    def _broken(self) -> VideoError:
        return VideoError(f"{self.name}: the decoder answered nonsense and was stopped: re-encode the file.")


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    root = str(Path(tieredkv.__file__).parents[1])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    # Threads and arenas of malloc reserve address space, which is limited.
    return {**kept, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}


def _widen(pipe: int) -> None:
    """Let whole frames be on their way where the system allows it."""
    if sys.platform == "linux":
        import fcntl

        try:
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE)
        except OSError:
            return
