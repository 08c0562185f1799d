"""Where the records of one layer are: what every arena guarantees, and the arena in host memory.

Shapes: `K` KV heads of the layer, `B` bytes of a record, which holds one chunk of one head.
"""

from __future__ import annotations

from typing import Protocol, Self

import torch

from tieredkv.memory.limits import check_host_memory
from tieredkv.memory.pagelock import PageLocker, aligned


class Arena(Protocol):
    """Records `(K, chunks, B)` uint8 of one layer, in memory (`MemoryArena`) or in a file (`memory.disk`).

    Whole chunks are written by `write`; the chunk that is being filled, the last one, by way of `open`. Earlier chunks
    may be read on one thread while later ones are written on another. What was never written is undefined.
    """

    @property
    def capacity(self) -> int:
        """Chunks that fit without growing."""

    @property
    def nbytes(self) -> int:
        """Host memory that it takes."""

    @property
    def records(self) -> torch.Tensor | None:
        """All of them, `(K, capacity, B)` in host memory, until it grows; None if they are not in memory."""

    def reserve(self, chunks: int) -> None:
        """Make room for `chunks` chunks in all, keeping those written. Never shrinks. No copy may be under way."""

    def shrink(self, chunks: int) -> None:
        """Give up the room beyond `chunks` chunks. No copy may be under way."""

    def write(self, first: int, records: torch.Tensor) -> None:
        """Write whole chunks `(K, n, B)`, on any device, from chunk `first` on; the room must exist.

        Copies from a card to memory are asynchronous, in the order of the current stream. Raises `OutputError` for a
        full disk.
        """

    def open(self, chunk: int) -> torch.Tensor:
        """The records `(K, B)` of a chunk that is being filled, in host memory, to be changed in place.

        Valid until another chunk is opened or the same one written: only one is open at a time. A chunk that was
        written or open before has its contents; another is undefined.
        """

    def freeze(self, chunks: int) -> None:
        """The first `chunks` chunks will not be written again. Later ones may then be kept elsewhere."""

    def whole(self) -> torch.Tensor:
        """All records, contiguous, `(K, >= capacity, B)`: in host memory, or mapped from a file. Until the next write,
        what was never written may be changed there."""

    def read(self, first: int, stop: int) -> torch.Tensor:
        """Records `(K, n, B)` of chunks first..stop on the host: a view where they are in memory, not to be changed."""

    def stage(self, first: int, stop: int, target: torch.Tensor) -> None:
        """Copy chunks first..stop into `target` `(K, n, B)`, on any device, whose rows are contiguous.

        As `read`, without a copy in between where they are in a file. Copies from memory to a card are asynchronous.
        """

    def fetch(self, heads: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
        """A copy `(m, B)` of the records `chunks[i]` of `heads[i]`, both `(m,)` on the host."""

    def close(self) -> None:
        """Free memory and files. May be called twice; nothing else may be called afterwards."""


class MemoryArena:
    """An arena in host memory, those of a head contiguous; page-locked if a card is to read it."""

    def __init__(self, heads: int, chunk_bytes: int, locker: PageLocker | None = None) -> None:
        """locker: keeps the memory page-locked."""
        self._locker = locker
        self._records = torch.empty((heads, 0, chunk_bytes), dtype=torch.uint8, device="cpu")

    @property
    def records(self) -> torch.Tensor:
        """`(K, capacity, B)` uint8; undefined where nothing was written."""
        return self._records

    @property
    def capacity(self) -> int:
        return self._records.shape[1]

    @property
    def nbytes(self) -> int:
        return self._records.nbytes

    def reserve(self, chunks: int) -> None:
        if chunks > self.capacity:
            heads, _, chunk_bytes = self._records.shape
            what = f"one layer's host cache of {chunks:,} chunks"
            check_host_memory(heads * chunks * chunk_bytes, what, "shorten the prompt or the video")
            self._resize(chunks)

    def shrink(self, chunks: int) -> None:
        if chunks < self.capacity:
            self._resize(chunks)

    def _resize(self, chunks: int) -> None:
        """Have a capacity of `chunks`, keeping the records that fit."""
        heads, had, chunk_bytes = self._records.shape
        shape, kept = (heads, chunks, chunk_bytes), min(chunks, had)
        if self._locker is None:
            moved = torch.empty(shape, dtype=torch.uint8, device="cpu")
        else:
            moved = aligned(shape, torch.uint8)
        moved[:, :kept] = self._records[:, :kept]
        self._replace(moved)

    @classmethod
    def of(cls, records: torch.Tensor, locker: PageLocker | None = None) -> Self:
        """With these contiguous records `(K, n, B)`: not copied, unless they have to be page-locked. Whoever gives a
        locker has checked that there is room for the copy."""
        arena = cls(records.shape[0], records.shape[2], locker)
        if locker is not None:
            records = aligned(tuple(records.shape), torch.uint8).copy_(records)
        arena._replace(records)
        return arena

    def _replace(self, records: torch.Tensor) -> None:
        if self._locker is not None:
            self._locker.unlock(self._records)
            self._locker.lock(records)
        self._records = records

    def write(self, first: int, records: torch.Tensor) -> None:
        target = self._records[:, first : first + records.shape[1]]
        for own, new in zip(target, records, strict=True):  # contiguous copies
            own.copy_(new, non_blocking=True)

    def open(self, chunk: int) -> torch.Tensor:
        return self._records[:, chunk]

    def freeze(self, chunks: int) -> None:
        """Does nothing."""

    def whole(self) -> torch.Tensor:
        return self._records

    def read(self, first: int, stop: int) -> torch.Tensor:
        return self._records[:, first:stop]

    def stage(self, first: int, stop: int, target: torch.Tensor) -> None:
        for own, new in zip(target, self._records[:, first:stop], strict=True):
            own.copy_(new, non_blocking=True)

    def fetch(self, heads: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
        return self._records[heads, chunks]

    def close(self) -> None:
        self._replace(self._records.new_empty((self._records.shape[0], 0, self._records.shape[2])))
