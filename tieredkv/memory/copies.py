"""Background copies: chunks that the next decoding step is likely to need, and blocks of the past during prefill."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

import torch

from tieredkv.errors import TieredKVError
from tieredkv.memory.capturing import CAPTURE


class BackgroundCopies(Protocol):
    """Runs copies in the background, at most one outstanding per key.

    Until `wait` on its key returns, a copy's destination must not be read or written, nor its source written. On a card
    `wait` orders only later device work; before the host touches the data, it must call `drain`.
    """

    def submit(self, key: Hashable, copy: Callable[[], int]) -> None:
        """Start `copy`, which returns the bytes it moved. RuntimeError if the key has one outstanding."""

    def wait(self, key: Hashable) -> int:
        """Order later work after the copy. Returns its bytes, 0 if none was outstanding. Raises the copy's error."""

    def drain(self) -> None:
        """Block until no copy is outstanding, ignoring errors. Call it before freeing slots."""

    def close(self) -> None:
        """Finish outstanding copies and end the background work. May be called twice."""


class ThreadCopies:
    """Copies on one thread: for a CPU-only machine, where torch's copies release the interpreter lock.

    A forked process does not have that thread and starts another; waiting for a copy from before the fork raises
    `TieredKVError`.
    """

    def __init__(self) -> None:
        self._lost: set[Hashable] = set()
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tieredkv-prefetch")
        self._pending: dict[Hashable, Future[int]] = {}

    def _restart_after_fork(self) -> None:
        if self._process != os.getpid():
            self._lost.update(self._pending)
            self._start()

    def submit(self, key: Hashable, copy: Callable[[], int]) -> None:
        self._restart_after_fork()
        if key in self._pending:
            raise RuntimeError(f"a copy for {key!r} is outstanding: wait for it first")
        self._pending[key] = self._executor.submit(copy)

    def wait(self, key: Hashable) -> int:
        self._restart_after_fork()
        if key in self._lost:
            self._lost.discard(key)
            raise TieredKVError("the process was forked while keys and values were being copied: ask again.")
        future = self._pending.get(key)
        if future is None:
            return 0
        try:
            return future.result()
        finally:
            if future.done():  # an interrupted wait leaves it outstanding
                self._pending.pop(key, None)

    def drain(self) -> None:
        self._restart_after_fork()
        self._lost.clear()
        wait(self._pending.values())
        self._pending.clear()

    def close(self) -> None:
        self._restart_after_fork()
        self._executor.shutdown(wait=True)
        self._pending.clear()


_streams: dict[int, torch.cuda.Stream] = {}
"""By card, for all copies of the process: torch keeps a workspace of 8 to 32 MiB for every stream on which matrices are
multiplied, as predictions of queries do. Of the lowest priority, as a card's default stream is; captured steps run on
one of a higher priority."""


def _stream_of(card: int) -> torch.cuda.Stream:
    if card not in _streams:
        _streams[card] = torch.cuda.Stream(card)
    return _streams[card]


class StreamCopies:
    """Copies on a separate CUDA stream of the current card. Only `drain` and `close` block the host.

    A copy starts after all earlier work on the current stream, and later work there starts after `wait`: events in both
    directions, so that no buffer is refilled while it is read. Both may be captured in a CUDA graph.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._used: set[torch.cuda.Stream] = set()
        self._pending: dict[Hashable, tuple[torch.cuda.Event, int, Callable[[], int]]] = {}

    def submit(self, key: Hashable, copy: Callable[[], int]) -> None:
        if key in self._pending:
            raise RuntimeError(f"a copy for {key!r} is outstanding: wait for it first")
        with CAPTURE:  # another session may be capturing the same stream
            stream = _stream_of(torch.cuda.current_device())
            self._used.add(stream)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                moved = copy()
                event = torch.cuda.Event()
                event.record(stream)
        # Keep a reference to `copy`: the tensors it reads and writes must not be freed before it is done.
        self._pending[key] = (event, moved, copy)

    def wait(self, key: Hashable) -> int:
        event, moved, _ = self._pending.pop(key, (None, 0, None))
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
        return moved

    def drain(self) -> None:
        if self._process == os.getpid():  # a forked process cannot use the card
            with CAPTURE:
                for stream in self._used:
                    stream.synchronize()
        self._pending.clear()

    def close(self) -> None:
        self.drain()
