"""Which chunk of a dynamic head is in which of its slots, which one gives way, and the copies that follow.

`Residency` holds the tables of one layer. The functions below work on them in plain torch; `tieredkv.ops.triton` has a
kernel for each, of the same signature. Shapes: `n` dynamic heads, `N` chunks, `R` retrieval slots of a head, `m` chunks
a head may be given in a step, `K` KV heads, `P` columns of a page table, `S` slots of the pool, `C` page tokens, `D`
head dim.
"""

from __future__ import annotations

import torch


class Residency:
    """Tables of the retrieval slots of `n` heads, at most `R` each; a head's slots are counted locally, from 0."""

    def __init__(self, slots: torch.Tensor, chunks: int) -> None:
        """slots: `(n, R)` pool slots owned, -1 for none. chunks: how many each head could ask for; none is resident."""
        n, r = slots.shape
        self.slots = slots.clone().int()
        self.chunk_in = torch.full((n, r), -1, dtype=torch.int32, device=slots.device)
        """`(n, R)`: the chunk in each slot, -1 for none."""
        self.slot_of = torch.full((n, chunks + 1), -1, dtype=torch.int32, device=slots.device)
        """`(n, N + 1)`: the slot each chunk is in, -1 for none; what lies in no chunk's place is never read."""
        self.last_used = torch.full((n, r), -1, dtype=torch.int32, device=slots.device)
        self.chosen = torch.zeros((n, chunks), dtype=torch.bool, device=slots.device)
        """`(n, N)`: chunks that the last step attended to."""

    @property
    def nbytes(self) -> int:
        """Device bytes of the tables."""
        return sum(t.nbytes for t in (self.slots, self.chunk_in, self.slot_of, self.last_used, self.chosen))

    @staticmethod
    def bytes_for(heads: int, slots: int, chunks: int) -> int:
        """`nbytes` of such tables, `slots` being the most that a head has."""
        return heads * (4 * (3 * slots + chunks + 1) + chunks)

    def enter(self, chunks: torch.Tensor) -> None:
        """Say that chunk `chunks[i, r]`, `(n, R)`, is in slot r of head i: the first ones to give way last.

        Where there is no slot, what is given does not count. Nothing must be resident before.
        """
        there = self.slots >= 0
        place = torch.arange(self.slots.shape[1], device=self.slots.device, dtype=torch.int32).expand_as(self.slots)
        self.chunk_in.copy_(torch.where(there, chunks, -1))
        self.last_used.copy_(torch.where(there, -1 - place, -1))
        self.slot_of.scatter_(1, torch.where(there, chunks, self.slot_of.shape[1] - 1), place)
        self.slot_of[:, -1] = -1

    def check_integrity(self) -> None:
        """Raise AssertionError if the two tables disagree or a chunk is in two slots."""
        for i in range(self.slots.shape[0]):
            resident = {int(c): s for s, c in enumerate(self.chunk_in[i].tolist()) if c >= 0}
            assert len(resident) == int((self.chunk_in[i] >= 0).sum()), "a chunk is in two slots"
            assert all(self.slots[i, s] >= 0 for s in resident.values()), "a chunk is in a slot that is not there"
            listed = {c: s for c, s in enumerate(self.slot_of[i, :-1].tolist()) if s >= 0}
            assert resident == listed, "slot_of and chunk_in disagree"
        owned = self.slots[self.slots >= 0]
        assert owned.unique().numel() == owned.numel(), "two heads share a slot"
