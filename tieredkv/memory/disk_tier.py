"""The disk below the host tier of one cache: a file for each layer, threads that read them, and what they have read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Protocol

import torch

from tieredkv.memory.disk import DiskArena
from tieredkv.memory.disk_reads import DiskCounts, Readers, RecordFile
from tieredkv.memory.pagelock import PageLocker

MOUNTS = Path("/proc/self/mounts")


class StoredFile(RecordFile, Protocol):
    """A file with tensors, and their mappings."""

    def offset_of(self, tensor: torch.Tensor) -> int:
        """Where a tensor that is mapped from the file begins in it."""


class DiskTier:
    """Creates the arenas of a cache's layers, which share host memory evenly."""

    def __init__(self, folder: Path, memory_bytes: int, layers: int, file: StoredFile | None = None) -> None:
        """folder: for temporary files. memory_bytes: of all layers, for the chunks that are in memory and for cached
        records. file: what `stored_arena` reads."""
        self.folder, self._file = folder, file
        self._readers, self._layers, self._share = Readers(), layers, memory_bytes // layers
        self._memory_bytes, self._arenas = memory_bytes, list[DiskArena]()

    @property
    def counts(self) -> DiskCounts:
        """What was read since `reset`."""
        return self._readers.counts

    def reset(self) -> None:
        """Set the counts to 0."""
        self._readers.counts = DiskCounts()

    def new_arena(self, heads: int, record_bytes: int, locker: PageLocker | None) -> DiskArena:
        """An empty arena in a temporary file. Raises `OutputError`."""
        return self._with(DiskArena.temporary(self.folder, heads, record_bytes, self._readers, self._share, locker))

    def stored_arena(self, records: torch.Tensor, whole: int, locker: PageLocker | None) -> DiskArena:
        """An arena with records `(K, chunks, B)` that are mapped from the file. whole: how many chunks are complete."""
        assert self._file is not None
        heads, chunks, record_bytes = records.shape
        place = self._file.offset_of(records), (heads, chunks, record_bytes), whole
        return self._with(DiskArena.stored(self._file, self.folder, *place, self._readers, self._share, locker))

    def _with(self, arena: DiskArena) -> DiskArena:
        self._arenas = [each for each in self._arenas if not each.closed] + [arena]
        return arena

    def leave_memory(self, nbytes: int) -> None:
        """Use this much less memory than at first, from now on."""
        self._share = max(0, self._memory_bytes - nbytes) // self._layers
        for arena in self._arenas:
            arena.set_memory(self._share)

    def close(self) -> None:
        """End the threads. The arenas belong to the layers."""
        self._readers.close()


def temporary_folder() -> Path:
    """The system's folder for temporary files, on a disk: many systems keep `/tmp` in memory, and `/var/tmp` not."""
    folder = Path(tempfile.gettempdir())
    other = Path("/var/tmp")
    if not os.environ.get("TMPDIR") and in_memory(folder) and os.access(other, os.W_OK) and not in_memory(other):
        return other
    return folder


def in_memory(folder: Path) -> bool:
    """Whether the files of a folder are kept in memory, as far as the system says."""
    try:
        mounts = [line.split() for line in MOUNTS.read_text("utf-8", "replace").splitlines()]
    except OSError:
        return False
    resolved = folder.resolve()
    there = [(len(Path(row[1]).parts), row[2]) for row in mounts if len(row) > 2 and resolved.is_relative_to(row[1])]
    return max(there, default=(0, ""))[1] in ("tmpfs", "ramfs")
