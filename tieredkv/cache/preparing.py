"""Compiling what decoding steps need while the prompt is still being read."""

from __future__ import annotations

import threading
from contextlib import suppress

import torch

from tieredkv.memory.ledger import on_device
from tieredkv.ops.base import Expected, Ops


class Preparing:
    """Runs `Ops.preparations` on a thread, one after another.

    An error ends only what raised it: if a step needs that kernel, the step raises it again. The thread keeps neither
    the process nor the cache alive.
    """

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, ops: Ops, expected: Expected, device: torch.device) -> None:
        """Begin, for one device."""
        run = threading.Thread(
            target=_run, args=(ops, expected, device, self._stopped), name="tieredkv-compile", daemon=True
        )
        self._threads.append(run)
        run.start()

    def wait(self) -> None:
        """Block until all is done."""
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        """Begin nothing more. Does not wait."""
        self._stopped.set()


def _run(ops: Ops, expected: Expected, device: torch.device, stopped: threading.Event) -> None:
    with suppress(Exception), on_device(device):
        for prepare in ops.preparations(expected):
            if stopped.is_set():
                return
            with suppress(Exception):
                prepare()
