"""Device pool: fixed-size slots, each one page of one KV head, and the table of which chunk is resident where.

`DevicePool` owns the memory and hands out slots. `Residency` is the index of one layer's retrieval slots: which
chunk is in which slot, and which slot gives way when another is wanted.
"""

from __future__ import annotations

import torch

from tieredkv.memory.device import DeviceLedger


class DevicePool:
    """`S` slots of one page `(2, C, D)` each, 0 at first. A slot belongs to nobody or to exactly one owner."""

    def __init__(
        self,
        ledger: DeviceLedger,
        slots: int,
        chunk_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.ledger = ledger
        self.pages = ledger.empty("pool", (slots, 2, chunk_tokens, head_dim), dtype, device).zero_()
        self._free = list(range(slots - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def take(self, count: int) -> torch.Tensor:
        """`count` free slots as `(count,)` int64; the caller owns them until `give_back`. MemoryError if too few."""
        if count > len(self._free):
            raise MemoryError(f"{count} slots wanted, {len(self._free)} free")
        slots = [self._free.pop() for _ in range(count)]
        self._taken.update(slots)
        return torch.tensor(slots, dtype=torch.int64, device=self.pages.device)

    def give_back(self, slots: torch.Tensor) -> None:
        """Return slots. ValueError, and nothing changes, if one of them was not taken."""
        ids = slots.flatten().tolist()
        if len(set(ids)) != len(ids) or not self._taken.issuperset(ids):
            raise ValueError(f"slots {ids} are not all taken")
        self._taken.difference_update(ids)
        self._free.extend(ids)

    def close(self) -> None:
        """Free the memory and stop counting it. The pool has no slots afterwards."""
        self.pages = self.pages.new_empty((0, *self.pages.shape[1:]))
        self._free, self._taken = [], set()
        self.ledger.release("pool")

    def check_integrity(self) -> None:
        """Raise AssertionError if a slot is lost, doubled, or both free and taken."""
        free = set(self._free)
        assert len(free) == len(self._free), "a slot is free twice"
        assert not free & self._taken, "a slot is free and taken"
        assert free | self._taken == set(range(self.pages.shape[0])), "a slot is lost"


NEVER = torch.iinfo(torch.int32).max
"""Last use of a slot that must not give way."""


class Residency:
    """Which chunks of `n` heads are in their retrieval slots, at most `R` each.

    Operations are of fixed shape on whole tensors, whatever each head's share: -1 stands for a slot that a head does
    not have, and for a chunk that is not asked for. Positions in the tables are local: slot `r` of head `i` is
    `slots[i, r]` of the pool.
    """

    def __init__(self, slots: torch.Tensor, chunks: int) -> None:
        """slots: `(n, R)` pool slots owned, -1 for none. chunks: how many each head could ask for; none is resident."""
        n, r = slots.shape
        # Each has one entry more than is used: what is not to be written goes there.
        with torch.inference_mode(False):  # or they could not be written outside that mode
            self.slots = slots.clone().int()
            self._chunk_in = torch.full((n, r + 1), -1, dtype=torch.int32, device=slots.device)
            self._slot_of = torch.full((n, chunks + 1), -1, dtype=torch.int32, device=slots.device)
            self._last_used = torch.full((n, r + 1), -1, dtype=torch.int32, device=slots.device)
            self._last_used[:, :r].masked_fill_(self.slots < 0, NEVER)

    @property
    def chunk_in(self) -> torch.Tensor:
        """`(n, R)`: the chunk in each slot, -1 for none."""
        return self._chunk_in[:, :-1]

    @property
    def slot_of(self) -> torch.Tensor:
        """`(n, chunks)`: the local slot each chunk is in, -1 for none."""
        return self._slot_of[:, :-1]

    @property
    def nbytes(self) -> int:
        """Device bytes of the tables."""
        return self.slots.nbytes + self._chunk_in.nbytes + self._slot_of.nbytes + self._last_used.nbytes

    @staticmethod
    def bytes_for(heads: int, slots: int, chunks: int) -> int:
        """`nbytes` of such tables, `slots` being the most that a head has."""
        return 4 * heads * (3 * slots + chunks + 3)

    def admit(
        self, wanted: torch.Tensor, clock: int, protected: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give every wanted chunk a slot; the caller copies the misses.

        wanted: `(n, m)` distinct chunk ids per head, -1 for none. protected: `(n, p)` local slots that must not give
        way, -1 for none; a head's wanted chunks and protected slots together must not outnumber its slots, and a
        wanted chunk may already be in one of them. clock: this step; larger is later. Victims are the least recently
        used slots that are neither wanted nor protected. Returns local slots `(n, m)`, -1 where none was wanted, and
        the mask of misses `(n, m)`; a missed chunk is entered in the tables at once, before its copy.
        """
        if wanted.shape[1] == 0:
            return wanted, wanted.bool()
        no_slot, no_chunk = self.slots.shape[1], self._slot_of.shape[1] - 1
        asked = wanted >= 0
        wanted = torch.where(asked, wanted, no_chunk)
        local = self._slot_of.gather(1, wanted).long()
        miss = asked & (local < 0)
        age = self._last_used.clone()
        age[:, no_slot] = NEVER
        age.scatter_(1, torch.where(local < 0, no_slot, local), NEVER)
        if protected is not None:
            age.scatter_(1, torch.where(protected < 0, no_slot, protected), NEVER)
        age, victims = age.sort(dim=1, stable=True)
        order = (miss.cumsum(1) - 1).clamp_(0, no_slot)
        if bool((miss & (age.gather(1, order) == NEVER)).any()):
            raise ValueError("more chunks wanted than fit the slots that may give way")
        local = torch.where(miss, victims.gather(1, order), local)

        target = torch.where(miss, local, no_slot)
        evicted = self._chunk_in.gather(1, target).long()
        self._slot_of.scatter_(1, torch.where(evicted < 0, no_chunk, evicted), -1)
        self._slot_of.scatter_(1, torch.where(miss, wanted, no_chunk), local.int())
        self._chunk_in.scatter_(1, target, wanted.int())
        self._last_used.scatter_(1, torch.where(asked, local, no_slot), clock)
        self._slot_of[:, no_chunk] = -1
        self._chunk_in[:, no_slot] = -1
        return local, miss

    def check_integrity(self) -> None:
        """Raise AssertionError if the two tables disagree or a chunk is in two slots."""
        n, _ = self.slots.shape
        for i in range(n):
            resident = {int(c): s for s, c in enumerate(self.chunk_in[i].tolist()) if c >= 0}
            assert len(resident) == int((self.chunk_in[i] >= 0).sum()), "a chunk is in two slots"
            assert all(self.slots[i, s] >= 0 for s in resident.values()), "a chunk is in a slot that is not there"
            listed = {c: s for c, s in enumerate(self.slot_of[i].tolist()) if s >= 0}
            assert resident == listed, "slot_of and chunk_in disagree"
        owned = self.slots[self.slots >= 0]
        assert owned.unique().numel() == owned.numel(), "two heads share a slot"
