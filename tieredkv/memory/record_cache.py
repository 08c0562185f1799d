"""A cache of records in host memory, in which those stay that are asked for most often.

A device's pool already holds what was used last, so what is asked for here has mostly not been asked for in a while.
The least recently used would be the wrong one to give way: with less room than the pool, hardly anything would be found
again. Instead a record that is read takes the place of one that was asked for less often (TinyLFU, Einziger et al.
2017, with exact counts).

Shapes: `S` slots, `K` heads, `B` bytes of a record, `m` records of one request. Indices are numpy's, int64.
"""

from __future__ import annotations

import numpy as np
import torch

_REFILL = 16
"""The first `1 / _REFILL` of the slots to give way are found at once: finding them reads the counts of all."""
_FORGET = 16
"""Counts are halved whenever `_FORGET * S` records have been asked for, so that what was popular once gives way."""


class RecordCache:
    """`S` records in `memory` `(S, B)` uint8, found by head and chunk."""

    def __init__(self, memory: torch.Tensor, heads: int) -> None:
        """The memory stays the caller's, to free after the last use."""
        self.memory = memory
        slots = len(memory)
        self._slot_of = np.full((heads, 0), -1, dtype=np.int32)
        """`(K, chunks)`: -1 for none."""
        self._asked = np.zeros((heads, 0), dtype=np.uint16)
        """`(K, chunks)`: how often each record was asked for."""
        self._head, self._chunk = (np.full(slots, -1, dtype=np.int32) for _ in range(2))
        """`(S,)`: what is in each slot, -1 for nothing."""
        self._used = np.zeros(slots, dtype=np.int64)
        """`(S,)`: when each slot was last used."""
        self._now, self._since = 1, 0
        self._next, self._key = (np.empty(0, dtype=np.int64) for _ in range(2))
        """Slots in the order in which they give way, and the keys of that order when they were found."""

    @staticmethod
    def slots_for(nbytes: int, heads: int, chunks: int, record_bytes: int) -> int:
        """S for this many bytes, with what it takes to find the records of `chunks` chunks. At least 0."""
        tables = RecordCache.table_bytes(heads * chunks)
        per_slot = record_bytes + 2 * 4 + 8 + 2 * 8 / _REFILL
        return max(0, min(heads * chunks, int((nbytes - tables) / per_slot)))

    @staticmethod
    def table_bytes(records: int) -> int:
        """What it takes to find any of so many records."""
        return (4 + 2) * records

    @property
    def nbytes(self) -> int:
        """Of the memory, and of what it takes to find a record."""
        tables = self._slot_of, self._asked, self._head, self._chunk, self._used, self._next, self._key
        return self.memory.nbytes + sum(table.nbytes for table in tables)

    def reserve(self, chunks: int) -> None:
        """Take records of chunks below `chunks`."""
        if (more := chunks - self._slot_of.shape[1]) > 0:
            self._slot_of = np.pad(self._slot_of, ((0, 0), (0, more)), constant_values=-1)
            self._asked = np.pad(self._asked, ((0, 0), (0, more)))

    def find(self, heads: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        """Slots `(m,)` of the records, -1 for those that are not here. Counts as their use."""
        self._now += 1
        self._since += len(heads)
        if self._since > _FORGET * len(self.memory):
            self._asked >>= 1
            self._since, self._next, self._key = 0, self._next[:0], self._key[:0]
        asked = self._asked[heads, chunks]
        self._asked[heads, chunks] = asked + (asked < np.iinfo(asked.dtype).max)
        slots = self._slot_of[heads, chunks].astype(np.int64)
        self._used[slots[slots >= 0]] = self._now
        return slots

    def add(self, heads: np.ndarray, chunks: np.ndarray, records: torch.Tensor) -> None:
        """Take in those of the records `(m, B)` that are asked for more often than what they replace.

        They are those that the last `find` has not found, all of them different. What it found stays.
        """
        asked = self._asked[heads, chunks].astype(np.int64)
        order, slots = np.argsort(-asked, kind="stable"), self._giving_way(len(asked))
        order = order[: len(slots)]
        taken = int((asked[order] > self._counts(slots[: len(order)])).sum())  # the first of both
        order, slots = order[:taken], slots[:taken]
        self._next, self._key = self._next[taken:], self._key[taken:]
        before = slots[self._chunk[slots] >= 0]
        self._slot_of[self._head[before], self._chunk[before]] = -1
        self._head[slots], self._chunk[slots], self._used[slots] = heads[order], chunks[order], self._now
        self._slot_of[heads[order], chunks[order]] = slots
        self.memory[torch.from_numpy(slots)] = records[torch.from_numpy(order)]

    def _counts(self, slots: np.ndarray) -> np.ndarray:
        """How often what is in each slot was asked for; -1 for nothing."""
        return np.where(self._chunk[slots] < 0, -1, self._asked[self._head[slots], self._chunk[slots]].astype(np.int64))

    def _keys(self, slots: np.ndarray) -> np.ndarray:
        """Ascending in the order in which slots give way: by count, then by last use."""
        return ((self._counts(slots) + 1) << 40) | self._used[slots]

    def _giving_way(self, count: int) -> np.ndarray:
        """The first `count` slots that give way, or fewer; those of the last `find` do not."""
        self._keep((self._keys(self._next) == self._key) & (self._used[self._next] < self._now))
        if len(self._next) < count:
            keys = self._keys(np.arange(len(self._used)))
            many = min(len(keys), max(count, len(keys) // _REFILL))
            found = np.argpartition(keys, many - 1)[:many]
            self._next = found[np.argsort(keys[found], kind="stable")]
            self._key = keys[self._next]
            self._keep(self._used[self._next] < self._now)
        return self._next[:count]

    def _keep(self, mask: np.ndarray) -> None:
        self._next, self._key = self._next[mask], self._key[mask]

    def drop(self, first: int, stop: int) -> None:
        """Forget the records of chunks first..stop."""
        part = self._slot_of[:, first:stop]
        slots = part[part >= 0]
        self._head[slots] = self._chunk[slots] = -1
        self._used[slots] = 0
        part[:] = -1
        self._asked[:, first:stop] = 0

    def check_integrity(self) -> None:
        """Raise AssertionError if the tables disagree."""
        (slots,) = (self._chunk >= 0).nonzero()
        assert (self._slot_of[self._head[slots], self._chunk[slots]] == slots).all(), "a slot is not found"
        assert int((self._slot_of >= 0).sum()) == len(slots), "a record is in a slot that does not list it"
