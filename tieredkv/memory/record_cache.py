"""A cache of records in host memory, from which the least recently used gives way.

Shapes: `S` slots, `K` heads, `B` bytes of a record, `m` records of one request. Indices are numpy's, int64.
"""

from __future__ import annotations

import numpy as np
import torch

_REFILL = 16
"""The oldest `1 / _REFILL` of the slots are found at once: finding them reads the times of all."""


class RecordCache:
    """`S` records in `memory` `(S, B)` uint8, found by head and chunk."""

    def __init__(self, memory: torch.Tensor, heads: int) -> None:
        """The memory stays the caller's, to free after the last use."""
        self.memory = memory
        slots = len(memory)
        self._slot_of = np.full((heads, 0), -1, dtype=np.int32)
        """`(K, chunks)`: -1 for none."""
        self._head, self._chunk = (np.full(slots, -1, dtype=np.int32) for _ in range(2))
        """`(S,)`: what is in each slot, -1 for nothing."""
        self._used = np.zeros(slots, dtype=np.int64)
        """`(S,)`: when each slot was last used; 0: it is empty."""
        self._now, self._hits = 1, 0
        self._oldest = np.empty(0, dtype=np.int64)
        """Slots in the order of their last use, as it was when they were found."""
        self._last_use = np.empty(0, dtype=np.int64)

    @staticmethod
    def slots_for(nbytes: int, heads: int, chunks: int, record_bytes: int) -> int:
        """S for this many bytes, with what it takes to find the records of `chunks` chunks. At least 0."""
        tables = 4 * heads * chunks
        per_slot = record_bytes + 2 * 4 + 8 + 2 * 8 / _REFILL
        return max(0, min(heads * chunks, int((nbytes - tables) / per_slot)))

    @property
    def nbytes(self) -> int:
        """Of the memory, and of what it takes to find a record."""
        tables = self._slot_of, self._head, self._chunk, self._used, self._oldest, self._last_use
        return self.memory.nbytes + sum(table.nbytes for table in tables)

    def reserve(self, chunks: int) -> None:
        """Take records of chunks below `chunks`."""
        heads, before = self._slot_of.shape
        if chunks > before:
            more = np.full((heads, chunks - before), -1, dtype=np.int32)
            self._slot_of = np.concatenate((self._slot_of, more), axis=1)

    def find(self, heads: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        """Slots `(m,)` of the records, -1 for those that are not here. Counts as their use."""
        self._now += 1
        slots = self._slot_of[heads, chunks].astype(np.int64)
        here = slots[slots >= 0]
        self._used[here], self._hits = self._now, len(here)
        return slots

    def add(self, heads: np.ndarray, chunks: np.ndarray, records: torch.Tensor) -> None:
        """Take in records `(m, B)` that the last `find` has not found, all of them different; as many as there are
        slots besides those it has found."""
        room = max(0, len(self._used) - self._hits)
        heads, chunks, records = heads[:room], chunks[:room], records[:room]
        slots = self._take(len(heads))
        before = self._chunk[slots] >= 0
        self._slot_of[self._head[slots[before]], self._chunk[slots[before]]] = -1
        self._head[slots], self._chunk[slots], self._used[slots] = heads, chunks, self._now
        self._slot_of[heads, chunks] = slots
        self.memory[torch.from_numpy(slots)] = records

    def _take(self, count: int) -> np.ndarray:
        """The `count` slots that were used longest ago, now marked as used. Those of the last `find` come last."""
        taken = [np.empty(0, dtype=np.int64)]
        while count:
            if not len(self._oldest):
                many = min(len(self._used), max(count, len(self._used) // _REFILL))
                found = np.argpartition(self._used, many - 1)[:many]
                self._oldest = found[np.argsort(self._used[found], kind="stable")]
                self._last_use = self._used[self._oldest]
            part, then = self._oldest[:count], self._last_use[:count]
            self._oldest, self._last_use = self._oldest[count:], self._last_use[count:]
            part = part[self._used[part] == then]  # the others have been used since
            self._used[part] = self._now
            taken.append(part)
            count -= len(part)
        return np.concatenate(taken)

    def drop(self, first: int, stop: int) -> None:
        """Forget the records of chunks first..stop."""
        part = self._slot_of[:, first:stop]
        slots = part[part >= 0]
        self._head[slots] = self._chunk[slots] = -1
        self._used[slots] = 0
        part[:] = -1

    def check_integrity(self) -> None:
        """Raise AssertionError if the tables disagree."""
        (slots,) = (self._chunk >= 0).nonzero()
        assert (self._slot_of[self._head[slots], self._chunk[slots]] == slots).all(), "a slot is not found"
        assert int((self._slot_of >= 0).sum()) == len(slots), "a record is in a slot that does not list it"
        assert (self._used[self._chunk < 0] == 0).all(), "an empty slot was used"
