"""Which chunk of a dynamic head is in which of its slots, and when each slot was last used.

The operations on these tables are `place` and `gather` of `ops.base`. Shapes: `n` dynamic heads, `N` chunks, `R`
retrieval slots of a head.
"""

from __future__ import annotations

import torch


class Residency:
    """Tables of one layer's retrieval slots. Local slots are numbered from 0 in each head.

    Everything is on one device, and is changed in place.
    """

    def __init__(self, slots: torch.Tensor, chunks: int) -> None:
        """slots: `(n, R)` pool slots of each head, -1 where it has fewer. chunks: N. No chunk is resident yet."""
        n, r = slots.shape
        self.slots = slots.clone().int()
        """`(n, R)`: the pool slot of each local slot, -1 for none."""
        self.chunk_in = torch.full((n, r), -1, dtype=torch.int32, device=slots.device)
        """`(n, R)`: the chunk in each slot, -1 for none."""
        self.slot_of = torch.full((n, chunks + 1), -1, dtype=torch.int32, device=slots.device)
        """`(n, N + 1)`: the local slot of each chunk, -1 for none. The last column stands for no chunk: it may be
        written to and is never read."""
        self.last_used = torch.full((n, r), -1, dtype=torch.int32, device=slots.device)
        """`(n, R)`: the step that last used each slot; negative before the first."""
        self.chosen = torch.zeros((n, chunks), dtype=torch.bool, device=slots.device)
        """`(n, N)`: chunks that the last step attended to."""

    @staticmethod
    def bytes_for(heads: int, slots: int, chunks: int) -> int:
        """Device bytes of the tables of `heads` heads. slots: R."""
        return heads * (4 * (3 * slots + chunks + 1) + chunks)

    def enter(self, chunks: torch.Tensor) -> None:
        """Enter chunk `chunks[i, r]`, `(n, R)`, in slot r of head i. The last slots will be replaced first.

        Entries of slots that a head does not have are ignored. The tables must be empty.
        """
        owned = self.slots >= 0
        place = torch.arange(self.slots.shape[1], device=self.slots.device, dtype=torch.int32).expand_as(self.slots)
        self.chunk_in.copy_(torch.where(owned, chunks, -1))
        self.last_used.copy_(torch.where(owned, -1 - place, -1))
        self.slot_of.scatter_(1, torch.where(owned, chunks, self.slot_of.shape[1] - 1), place)
        self.slot_of[:, -1] = -1

    def check_integrity(self) -> None:
        """Raise AssertionError if the two tables disagree or a chunk is in two slots."""
        for i in range(self.slots.shape[0]):
            resident = {int(c): s for s, c in enumerate(self.chunk_in[i].tolist()) if c >= 0}
            assert len(resident) == int((self.chunk_in[i] >= 0).sum()), "a chunk is in two slots"
            assert all(self.slots[i, s] >= 0 for s in resident.values()), "a chunk is in a slot that its head lacks"
            listed = {c: s for c, s in enumerate(self.slot_of[i, :-1].tolist()) if s >= 0}
            assert resident == listed, "slot_of and chunk_in disagree"
        owned = self.slots[self.slots >= 0]
        assert owned.unique().numel() == owned.numel(), "two heads share a slot"
