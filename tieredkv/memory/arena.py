"""Where the records of one layer are: what every arena guarantees.

Shapes: `K` KV heads of the layer, `B` bytes of a record, which holds one chunk of one head.
"""

from __future__ import annotations

from typing import Protocol

import torch


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
