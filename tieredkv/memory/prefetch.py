"""Copies that run ahead of whoever needs them: chunks likely next while decoding, blocks of the past in prefill."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol


class Prefetcher(Protocol):
    """Runs copies in the background, at most one outstanding per key.

    A slot that is the target of a submitted copy must not be read or written until `wait` on its key has returned.
    """

    def submit(self, key: Hashable, copy: Callable[[], int]) -> None:
        """Start `copy`, which returns the bytes it moved. The key must have nothing outstanding."""

    def wait(self, key: Hashable) -> int:
        """Block until the key's copy is done; bytes moved, 0 when nothing was outstanding. Raises what it raised."""

    def drain(self) -> None:
        """Block until nothing is outstanding, whatever became of it: for slots that are given up."""

    def close(self) -> None:
        """Finish what is outstanding and end the background work. Twice is fine."""


class ThreadPrefetcher:
    """Prefetcher on one thread of its own: for a CPU-only machine, where torch's copies release the interpreter."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tieredkv-prefetch")
        self._pending: dict[Hashable, Future[int]] = {}

    def submit(self, key: Hashable, copy: Callable[[], int]) -> None:
        if key in self._pending:
            raise RuntimeError(f"a copy for {key!r} is outstanding: wait for it first")
        self._pending[key] = self._executor.submit(copy)

    def wait(self, key: Hashable) -> int:
        future = self._pending.get(key)
        if future is None:
            return 0
        try:
            return future.result()
        finally:
            if future.done():  # an interrupted wait leaves it outstanding
                self._pending.pop(key, None)

    def drain(self) -> None:
        wait(self._pending.values())
        self._pending.clear()

    def close(self) -> None:
        self._executor.shutdown(wait=True)
        self._pending.clear()
