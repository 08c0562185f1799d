"""Copies that run ahead of whoever needs them: chunks likely next while decoding, blocks of the past in prefill."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

import torch

from tieredkv.errors import TieredKVError


class Prefetcher(Protocol):
    """Runs copies in the background, at most one outstanding per key.

    What a submitted copy writes must not be read or written, nor what it reads be written, until `wait` on its key has
    returned. On a card that holds for work given to the device afterwards; the host itself must `drain` first.
    """

    def submit(self, key: Hashable, copy: Callable[[], int]) -> None:
        """Start `copy`, which returns the bytes it moved. The key must have nothing outstanding."""

    def wait(self, key: Hashable) -> int:
        """What follows happens after the copy; bytes moved, 0 if nothing was outstanding. Raises what it raised."""

    def drain(self) -> None:
        """Block until nothing is outstanding, whatever became of it: for slots that are given up."""

    def close(self) -> None:
        """Finish what is outstanding and end the background work. Twice is fine."""


class ThreadPrefetcher:
    """Prefetcher on one thread of its own: for a CPU-only machine, where torch's copies release the interpreter.

    In a forked process, where that thread is not, it begins another; to wait for a copy of before raises
    `TieredKVError`.
    """

    def __init__(self) -> None:
        self._lost: set[Hashable] = set()
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tieredkv-prefetch")
        self._pending: dict[Hashable, Future[int]] = {}

    def _after_fork(self) -> None:
        if self._process != os.getpid():
            self._lost.update(self._pending)
            self._begin()

    def submit(self, key: Hashable, copy: Callable[[], int]) -> None:
        self._after_fork()
        if key in self._pending:
            raise RuntimeError(f"a copy for {key!r} is outstanding: wait for it first")
        self._pending[key] = self._executor.submit(copy)

    def wait(self, key: Hashable) -> int:
        self._after_fork()
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
        self._after_fork()
        self._lost.clear()
        wait(self._pending.values())
        self._pending.clear()

    def close(self) -> None:
        self._after_fork()
        self._executor.shutdown(wait=True)
        self._pending.clear()


class StreamCopies:
    """Prefetcher on a CUDA stream of its own for each card. Nothing here waits on the host but `drain` and `close`.

    A copy starts after all that was given to the current stream before it, and `wait` makes what follows there start
    after the copy: events both ways, so that no buffer is refilled while it is read. Both may be captured in a graph.
    The card is the current one.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._pending: dict[Hashable, tuple[torch.cuda.Event, int, Callable[[], int]]] = {}

    def submit(self, key: Hashable, copy: Callable[[], int]) -> None:
        if key in self._pending:
            raise RuntimeError(f"a copy for {key!r} is outstanding: wait for it first")
        card = torch.cuda.current_device()
        if card not in self._streams:
            self._streams[card] = torch.cuda.Stream(card)
        stream = self._streams[card]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            moved = copy()
            done = torch.cuda.Event()
            done.record(stream)
        # The copy is kept: what it reads and writes must not be freed before it is done.
        self._pending[key] = (done, moved, copy)

    def wait(self, key: Hashable) -> int:
        done, moved, _ = self._pending.pop(key, (None, 0, None))
        if done is not None:
            torch.cuda.current_stream().wait_event(done)
        return moved

    def drain(self) -> None:
        if self._process == os.getpid():  # a forked process has no use of the card
            for stream in self._streams.values():
                stream.synchronize()
        self._pending.clear()

    def close(self) -> None:
        self.drain()


class Transfer:
    """Host/device copies and their byte counts. One per cache. `stage` may run on another thread."""

    def __init__(self) -> None:
        self.streamed_bytes = 0
        """Past keys and values streamed to the device during prefill."""

    def stage(self, chunks: torch.Tensor, staged: torch.Tensor, with_values: bool) -> int:
        """Copy consecutive host chunks `(K, n, 2, C, D)` into a device buffer of the same shape; bytes moved.

        Of what is on the host, the keys alone suffice without `with_values`; a card is faster given both, which lie
        side by side: one contiguous copy per head.
        """
        if staged.device.type == "cpu":
            part = slice(0, 2 if with_values else 1)
            staged[:, :, part].copy_(chunks[:, :, part])
            return staged[:, :, part].numel() * staged.itemsize
        for to, of in zip(staged, chunks, strict=True):
            to.copy_(of, non_blocking=True)
        return staged.nbytes

    def reset(self) -> None:
        """Start the counts again."""
        self.streamed_bytes = 0
