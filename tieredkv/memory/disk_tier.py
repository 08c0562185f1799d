"""The disk below the host tier of one cache: a file for each layer, threads that read them, and what they have read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tieredkv.memory.disk import DiskArena
from tieredkv.memory.disk_reads import DiskCounts, Readers, RecordFile
from tieredkv.memory.pagelock import PageLocker

MOUNTS = Path("/proc/self/mounts")


class DiskTier:
    """Creates the arenas of a cache's layers, which share host memory evenly."""

    def __init__(self, folder: Path, memory_bytes: int, layers: int) -> None:
        """folder: for temporary files. memory_bytes: of all layers, for the chunks that are in memory and for recent
        records."""
        self.folder = folder
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

    def stored_arena(
        self, file: RecordFile, offset: int, shape: tuple[int, int, int], whole: int, locker: PageLocker | None
    ) -> DiskArena:
        """An arena with records that lie in a file already: as `DiskArena.stored`."""
        return self._with(DiskArena.stored(file, self.folder, offset, shape, whole, self._readers, self._share, locker))

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
