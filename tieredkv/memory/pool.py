"""Device pool: fixed-size slots, each one page of one KV head, and the table of which chunk is resident where.

`DevicePool` owns the memory and hands out slots. `Residency` is the index of one layer's retrieval slots: which
chunk is in which slot, and which slot gives way when another is wanted.
"""

from __future__ import annotations

import torch

from tieredkv.memory.device import DeviceLedger


class DevicePool:
    """`S` slots of one page `(2, C, D)` each. A slot belongs to nobody or to exactly one owner."""

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
        self.pages = ledger.empty("pool", (slots, 2, chunk_tokens, head_dim), dtype, device)
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
        with torch.inference_mode(False):  # or they could not be written outside that mode
            self.slots = slots.clone().int()
            self.chunk_in = torch.full((n, r), -1, dtype=torch.int32, device=slots.device)
            self.slot_of = torch.full((n, chunks), -1, dtype=torch.int32, device=slots.device)
            self.last_used = torch.where(self.slots < 0, NEVER, -1).int()

    @staticmethod
    def bytes_for(heads: int, slots: int, chunks: int) -> int:
        """Device bytes of the tables, `slots` being the most that a head has."""
        return 4 * heads * (3 * slots + chunks)

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
        n, m = wanted.shape
        asked = wanted >= 0
        needed = asked.sum(1) if protected is None else asked.sum(1) + (protected >= 0).sum(1)
        if bool((needed > (self.slots >= 0).sum(1)).any()):
            raise ValueError("more chunks wanted than fit the slots that may give way")
        local = torch.where(asked, self.slot_of.gather(1, wanted.clamp(min=0)), -1).long()
        miss = asked & (local < 0)
        age = self.last_used.clone()
        _keep(age, local)
        if protected is not None:
            _keep(age, protected)
        victims = age.argsort(dim=1, stable=True)
        order = (miss.long().cumsum(1) - 1).clamp(min=0)
        local = torch.where(miss, victims.gather(1, order), local)

        row = torch.arange(n, device=wanted.device).unsqueeze(1).expand(n, m)
        old = self.chunk_in[row[miss], local[miss]].long()
        evicted = old >= 0
        self.slot_of[row[miss][evicted], old[evicted]] = -1
        self.chunk_in[row[miss], local[miss]] = wanted[miss].int()
        self.slot_of[row[miss], wanted[miss]] = local[miss].int()
        self.last_used[row[asked], local[asked]] = clock
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


def _keep(age: torch.Tensor, local: torch.Tensor) -> None:
    """Mark the slots `(n, m)`, -1 for none, as ones that must not give way."""
    # Where there is none, `amax` with -1 leaves slot 0 as it is.
    age.scatter_reduce_(1, local.clamp(min=0), torch.where(local < 0, -1, NEVER).to(age.dtype), reduce="amax")
