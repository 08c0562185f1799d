"""Many reads of one file at the same time, and what they are counted in."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from tieredkv.errors import TieredKVError

THREADS = 8
"""A disk answers several requests sooner than one after another."""
PIECE = 4 * 2**20
"""Most bytes of one read."""
INLINE_READS = 4
"""So few are not worth handing over to threads."""


class Read(NamedTuple):
    """Bytes of a file to fill `target` with, from `offset` on."""

    target: memoryview
    offset: int


class RecordFile(Protocol):
    """An open file that records are read from."""

    @property
    def descriptor(self) -> int:
        """Open until `close`."""

    def check(self) -> None:
        """Raise `TieredKVError` if the file is not what it was when it was opened."""

    def unreadable(self, reason: str) -> TieredKVError:
        """The error of a read that failed."""

    def close(self) -> None:
        """May be called twice."""


@dataclass(slots=True)
class DiskCounts:
    """What was read for all layers of a cache."""

    read_bytes: int = 0
    hits: int = 0
    """Records asked for one by one that were in host memory."""
    misses: int = 0
    """Those that were not."""

    @property
    def hit_rate(self) -> float | None:
        """Share of hits; None if no record was asked for."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


class Readers:
    """Threads that read for all layers of a cache.

    A forked process has none of its parent's and starts its own.
    """

    def __init__(self) -> None:
        self.counts = DiskCounts()
        self._start()

    def _start(self) -> None:
        self._process, self._counting = os.getpid(), threading.Lock()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tieredkv-disk")

    def _restart_after_fork(self) -> None:
        if self._process != os.getpid():
            self._start()

    def read(self, file: RecordFile, reads: Sequence[Read]) -> None:
        """Fill all targets. Raises what the file says of a read that failed, once none is under way."""
        self._restart_after_fork()
        file.check()
        parts = [reads] if len(reads) <= INLINE_READS else [part for i in range(THREADS) if (part := reads[i::THREADS])]
        if len(parts) == 1:
            _read_all(file, reads)
        else:
            futures = [self._threads.submit(_read_all, file, part) for part in parts]
            wait(futures)
            for future in futures:
                future.result()
        file.check()  # or what was read may be of two files
        self.count(read_bytes=sum(len(read.target) for read in reads))

    def count(self, read_bytes: int = 0, hits: int = 0, misses: int = 0) -> None:
        """Add to the counts."""
        self._restart_after_fork()
        with self._counting:
            self.counts.read_bytes += read_bytes
            self.counts.hits += hits
            self.counts.misses += misses

    def close(self) -> None:
        """End the threads. May be called twice."""
        self._restart_after_fork()
        self._threads.shutdown(wait=True)


def runs(offsets: np.ndarray, records: torch.Tensor) -> list[Read]:
    """The reads that fill `records` `(m, B)` from ascending offsets `(m,)`: neighbours in one."""
    b = records.shape[1]
    starts = np.flatnonzero(np.diff(offsets, prepend=-b - 1) != b)
    stops, target = np.append(starts[1:], len(offsets)), memory_of(records)
    return [
        Read(target[first * b : stop * b], offset)
        for first, stop, offset in zip(starts.tolist(), stops.tolist(), offsets[starts].tolist(), strict=True)
    ]


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor on the host."""
    return tensor.view(-1).numpy().data


def _read_all(file: RecordFile, reads: Sequence[Read]) -> None:
    for target, offset in reads:
        done = 0
        while done < len(target):
            try:
                count = _read_at(file.descriptor, target[done:], offset + done)
            except OSError as error:
                raise file.unreadable(error.strerror or str(error)) from None
            if count == 0:
                raise file.unreadable("it ends too early")
            done += count


if hasattr(os, "preadv"):

    def _read_at(descriptor: int, target: memoryview, offset: int) -> int:
        return os.preadv(descriptor, [target], offset)

else:  # on Windows, where a descriptor has one position
    _positioning = threading.Lock()

    def _read_at(descriptor: int, target: memoryview, offset: int) -> int:
        with _positioning:
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, len(target))
        target[: len(data)] = data
        return len(data)
