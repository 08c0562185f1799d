"""Records in a file, for host memory that does not hold them: read when they are needed, the most wanted ones kept.

Shapes: `K` KV heads of a layer, `B` bytes of a record, `m` records of one request.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tieredkv.errors import OutputError, TieredKVError
from tieredkv.memory.disk_reads import PIECE, Read, Readers, RecordFile, memory_of, runs
from tieredkv.memory.pagelock import PageLocker, aligned
from tieredkv.memory.record_cache import RecordCache
from tieredkv.memory.temporary_file import TemporaryFile


@dataclass(frozen=True, slots=True)
class Extent:
    """Part of a file: `K` regions, one after another, of `chunks` records each."""

    offset: int
    first: int
    """Number of its first chunk."""
    chunks: int

    @property
    def stop(self) -> int:
        """Number of the chunk after its last."""
        return self.first + self.chunks

    def end(self, heads: int, record_bytes: int) -> int:
        """Offset of the byte after it."""
        return self.offset + heads * self.chunks * record_bytes


class TemporaryRecords:
    """A `RecordFile` to write records to, which disappears with the process at the latest."""

    def __init__(self, folder: Path) -> None:
        """Raises `OutputError` if the folder cannot have it."""
        self._folder, self._process = folder, os.getpid()
        try:
            self._file = TemporaryFile(folder)
        except OSError as error:
            raise self._unwritable(error) from None

    @property
    def descriptor(self) -> int:
        return self._file.descriptor

    def check(self) -> None:
        """Nobody else can open the file."""

    def unreadable(self, reason: str) -> TieredKVError:
        return TieredKVError(
            f"keys and values on the disk of {self._folder} could not be read: {reason}. Ingest the video again."
        )

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f"keys and values could not be written to the disk of {self._folder}: {error.strerror or error}. Free "
            "some, name another folder in TMPDIR, or raise host_kv_gb."
        )

    def lengthen(self, nbytes: int) -> None:
        """Make the file this long; what is not written yet takes no disk. Raises `OutputError`."""
        try:
            os.ftruncate(self.descriptor, nbytes)
        except OSError as error:
            raise self._unwritable(error) from None

    def write(self, data: memoryview, offset: int) -> None:
        """Raises `OutputError`, and `TieredKVError` in a forked process, whose parent has the same file."""
        if self._process != os.getpid():
            raise TieredKVError(
                "the process was forked while keys and values were written to disk: ingest the video again."
            )
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self.descriptor, data[done:], offset + done)
            except OSError as error:
                raise self._unwritable(error) from None

    def close(self) -> None:
        self._file.close()


class DiskArena:
    """An `Arena` in a file. The chunk that is being filled is in memory, and so is all that follows `freeze`.

    Of the records that are fetched, those asked for most often stay in memory; what is read or staged does not.
    """

    records = None

    def __init__(
        self,
        file: TemporaryRecords | RecordFile,
        folder: Path,
        heads: int,
        record_bytes: int,
        readers: Readers,
        memory_bytes: int,
        locker: PageLocker | None = None,
    ) -> None:
        """Owns `file`. folder: for temporary files. memory_bytes: as for `set_memory`. locker: keeps cached records
        page-locked."""
        self._file, self._folder, self._heads, self._record_bytes = file, folder, heads, record_bytes
        self._readers, self._memory_bytes, self._locker = readers, memory_bytes, locker
        self._extents: list[Extent] = []
        self._frozen, self.closed = False, False
        self._memory, self._in_memory = self._empty(0), 0
        """`(K, n, B)`: chunks that are not in the file, or newer than there, and the number of the first of them. At
        most one before `freeze`."""
        self._cache: RecordCache | None = None
        self._process, self._lock = os.getpid(), threading.RLock()
        """The lock is held while chunks move between memory, file and cache."""
        self._close_file = weakref.finalize(self, file.close)

    @classmethod
    def temporary(
        cls,
        folder: Path,
        heads: int,
        record_bytes: int,
        readers: Readers,
        memory_bytes: int,
        locker: PageLocker | None = None,
    ) -> DiskArena:
        """An empty arena in a temporary file in `folder`. Raises `OutputError`."""
        return cls(TemporaryRecords(folder), folder, heads, record_bytes, readers, memory_bytes, locker)

    @classmethod
    def stored(
        cls,
        file: RecordFile,
        folder: Path,
        offset: int,
        shape: tuple[int, int, int],
        whole: int,
        readers: Readers,
        memory_bytes: int,
        locker: PageLocker | None = None,
    ) -> DiskArena:
        """The records `(K, chunks, B)` that lie in a file at `offset`, which is never written. whole: how many of the
        chunks are complete."""
        heads, chunks, record_bytes = shape
        arena = cls(file, folder, heads, record_bytes, readers, memory_bytes, locker)
        arena._extents.append(Extent(offset, 0, chunks))
        arena.freeze(whole)
        return arena

    def _empty(self, chunks: int) -> torch.Tensor:
        return torch.zeros((self._heads, chunks, self._record_bytes), dtype=torch.uint8, device="cpu")

    def _locked(self) -> threading.RLock:
        if self._process != os.getpid():  # in a forked process, a thread that no longer exists may have held it
            self._process, self._lock = os.getpid(), threading.RLock()
        return self._lock

    # ---- sizes

    @property
    def _in_file(self) -> int:
        """Chunks that the file has room for."""
        return self._extents[-1].stop if self._extents else 0

    @property
    def capacity(self) -> int:
        return self._in_memory + self._memory.shape[1] if self._frozen else self._in_file

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes + (0 if self._cache is None else self._cache.nbytes)

    def set_memory(self, nbytes: int) -> None:
        """Host memory to use from now on: for the chunks that are in memory, and what is left of it for others.

        The cache of records is allocated when it is first used, and begins empty once it has to be smaller.
        """
        with self._locked():
            self._memory_bytes = nbytes
            if self._cache is not None and self.nbytes > nbytes:
                self._drop_cache()

    def reserve(self, chunks: int) -> None:
        """As `Arena.reserve`. Raises `OutputError`."""
        if (more := chunks - self.capacity) <= 0:
            return
        if self._frozen:
            self._memory = torch.cat((self._memory, self._empty(more)), dim=1)
            self.set_memory(self._memory_bytes)
            return
        assert isinstance(self._file, TemporaryRecords)
        begin = self._extents[-1].end(self._heads, self._record_bytes) if self._extents else 0
        extent = Extent(begin, self.capacity, more)
        self._file.lengthen(extent.end(self._heads, self._record_bytes))
        self._extents.append(extent)

    def shrink(self, chunks: int) -> None:
        """As `Arena.shrink`, of the memory alone: a file has no bytes where nothing was written."""
        if self._frozen and chunks < self.capacity:
            self._memory = self._memory[:, : max(0, chunks - self._in_memory)].clone()

    def whole(self) -> torch.Tensor:
        """As `Arena.whole`: mapped. What is changed there takes memory, and does not reach the file. Raises
        `OutputError`."""
        if len(self._extents) != 1 or self._extents[0].chunks < self.capacity:
            return self._copy().whole()
        (extent,) = self._extents
        shape = self._heads, extent.chunks, self._record_bytes
        offset, nbytes = extent.offset, math.prod(shape)
        begin = offset % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self._file.descriptor, begin + nbytes, access=mmap.ACCESS_COPY, offset=offset - begin)
        records = torch.frombuffer(mapped, dtype=torch.uint8, count=nbytes, offset=begin).view(shape)
        with self._locked():
            records[:, self._in_memory : self._in_memory + self._memory.shape[1]] = self._memory
        return records

    def _copy(self) -> DiskArena:
        """The same records in one extent of another temporary file. Raises `OutputError`."""
        folder, capacity = self._folder, self.capacity
        copy = DiskArena.temporary(folder, self._heads, self._record_bytes, self._readers, 0)
        copy.reserve(capacity)
        step = max(1, 2 * PIECE // (self._heads * self._record_bytes))
        for first in range(0, capacity, step):
            stop = min(first + step, capacity)
            copy.write(first, self.read(first, stop))
        return copy

    # ---- writing

    def write(self, first: int, records: torch.Tensor) -> None:
        """As `Arena.write`; has copied when it returns."""
        stop = first + records.shape[1]
        with self._locked():
            if self._frozen:
                self.freeze(first)
                self._memory[:, first - self._in_memory : stop - self._in_memory] = records
                return
            self._write(first, records)
            if first <= self._in_memory < stop:
                self._memory = self._empty(0)

    def open(self, chunk: int) -> torch.Tensor:
        """As `Arena.open`."""
        with self._locked():
            if self._frozen:
                self.freeze(chunk)
            elif chunk != self._in_memory or not self._memory.shape[1]:
                if self._memory.shape[1]:
                    self._write(self._in_memory, self._memory)
                self._memory, self._in_memory = self.read(chunk, chunk + 1), chunk
            return self._memory[:, chunk - self._in_memory]

    def _write(self, first: int, records: torch.Tensor) -> None:
        """Write chunks to the file."""
        assert isinstance(self._file, TemporaryRecords)
        stop = first + records.shape[1]
        for head, rows in enumerate(records):
            for begin, end, offset in self._pieces(head, first, stop):
                self._file.write(memory_of(rows[begin - first : end - first].cpu().contiguous()), offset)
        if self._cache is not None:
            self._cache.drop(first, stop)

    def freeze(self, chunks: int) -> None:
        """As `Arena.freeze`: the file is not written any more, and what follows `chunks` chunks is in memory."""
        with self._locked():
            if self._frozen and chunks >= self._in_memory:
                return
            if self._memory.shape[1] and self._in_memory < chunks:
                self._write(self._in_memory, self._memory)
                self._memory = self._empty(0)
            capacity = self.capacity
            memory = self._empty(capacity - chunks)
            if chunks < capacity:  # the first may be filled in part
                memory[:, :1] = self.read(chunks, chunks + 1)
            self._memory, self._in_memory, self._frozen = memory, chunks, True
            self.set_memory(self._memory_bytes)

    # ---- reading

    def read(self, first: int, stop: int) -> torch.Tensor:
        """As `Arena.read`; a copy."""
        target = torch.empty((self._heads, stop - first, self._record_bytes), dtype=torch.uint8, device="cpu")
        self._fill(first, stop, target)
        return target

    def stage(self, first: int, stop: int, target: torch.Tensor) -> None:
        """As `Arena.stage`; has copied when it returns."""
        if target.device.type == "cpu":
            self._fill(first, stop, target)
            return
        step = max(1, 2 * PIECE // (self._heads * self._record_bytes))
        for begin in range(first, stop, step):
            end = min(begin + step, stop)
            target[:, begin - first : end - first].copy_(self.read(begin, end))

    def _fill(self, first: int, stop: int, target: torch.Tensor) -> None:
        with self._locked():  # before the file is read: they may be written there, and replaced, meanwhile
            in_memory, chunks = self._in_memory, self._memory.shape[1]
            begin, end = max(first, in_memory), min(stop, in_memory + chunks)
            newer = self._memory[:, begin - in_memory : end - in_memory].clone() if begin < end else None
            last = min(stop, in_memory) if self._frozen else stop
        rows = (
            Read(memory_of(target[head, chunk - first : until - first]), offset)
            for head in range(self._heads)
            for chunk, until, offset in self._pieces(head, first, last)
        )
        self._readers.read(self._file, list(rows))
        if newer is not None:
            target[:, begin - first : end - first] = newer

    def _pieces(self, head: int, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where chunks first..stop of a head are in the file: begin, end and offset of each part."""
        b, step = self._record_bytes, max(1, PIECE // self._record_bytes)
        for extent in self._extents:
            until = min(stop, extent.stop)
            for begin in range(max(first, extent.first), until, step):
                yield begin, min(begin + step, until), extent.offset + (head * extent.chunks + begin - extent.first) * b

    def fetch(self, heads: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
        """As `Arena.fetch`."""
        pinned = self._locker is not None
        out = torch.empty((len(heads), self._record_bytes), dtype=torch.uint8, device="cpu", pin_memory=pinned)
        at_once = max(1, PIECE // self._record_bytes)
        with self._locked():
            for some, there, target in zip(
                heads.split(at_once), chunks.split(at_once), out.split(at_once), strict=True
            ):
                self._fetch(some.numpy().astype(np.int64), there.numpy().astype(np.int64), target)
        return out

    def _fetch(self, heads: np.ndarray, chunks: np.ndarray, out: torch.Tensor) -> None:
        place = chunks - self._in_memory
        own = (place >= 0) & (place < self._memory.shape[1])
        if own.any():
            out[_index(own)] = self._memory[torch.from_numpy(heads[own]), torch.from_numpy(place[own])]
        wanted, cache = np.flatnonzero(~own), self._record_cache()
        if cache is not None:
            slots = cache.find(heads[wanted], chunks[wanted])
            here = slots >= 0
            out[torch.from_numpy(wanted[here])] = cache.memory.index_select(0, torch.from_numpy(slots[here]))
            self._readers.count(hits=int(here.sum()))
            wanted = wanted[~here]
        if not len(wanted):
            return
        offsets, first, inverse = np.unique(
            self._offsets(heads[wanted], chunks[wanted]), return_index=True, return_inverse=True
        )
        records = torch.empty((len(offsets), self._record_bytes), dtype=torch.uint8, device="cpu")
        self._readers.read(self._file, runs(offsets, records))
        self._readers.count(misses=len(offsets))
        out[torch.from_numpy(wanted)] = records[torch.from_numpy(inverse.reshape(-1))]
        if cache is not None:
            cache.add(heads[wanted[first]], chunks[wanted[first]], records)

    def _offsets(self, heads: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        """Where records are in the file."""
        table = np.array([(extent.offset, extent.first, extent.chunks) for extent in self._extents], dtype=np.int64)
        offset, first, size = table[np.searchsorted(table[:, 1], chunks, side="right") - 1].T
        return offset + (heads * size + chunks - first) * self._record_bytes

    def _record_cache(self) -> RecordCache | None:
        """The cache of records; None if there is no memory for one."""
        if self._cache is None:
            left = self._memory_bytes - self._memory.nbytes
            slots = RecordCache.slots_for(left, self._heads, self._in_file, self._record_bytes)
            if slots == 0:
                return None
            shape = (slots, self._record_bytes)
            if self._locker is None:
                memory = torch.empty(shape, dtype=torch.uint8, device="cpu")
            else:
                memory = aligned(shape, torch.uint8)
                self._locker.lock(memory)
            self._cache = RecordCache(memory, self._heads)
        self._cache.reserve(self._in_file)
        return self._cache

    def _drop_cache(self) -> None:
        if self._cache is not None and self._locker is not None:
            self._locker.unlock(self._cache.memory)
        self._cache = None

    def close(self) -> None:
        """As `Arena.close`."""
        if not self.closed:
            self._drop_cache()
            self._memory, self._extents, self.closed = self._empty(0), [], True
            self._close_file()
            del self._file


def _index(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(mask))
