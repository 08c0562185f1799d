"""What the pages of a layer hold when decoding begins, planned on the host: its page table, and the chunks to copy."""

from __future__ import annotations

import torch


class Filling:
    """The page table of one layer, and the whole chunks that its pages are filled with.

    Everything is on the host, where it is decided, so that a card is neither asked nor waited for. Shapes: `K` KV
    heads, `P` columns of the table, `C` tokens of a page.
    """

    def __init__(self, heads: int, width: int, chunk_tokens: int) -> None:
        """width: P."""
        self._c = chunk_tokens
        self.table = torch.zeros((heads, width), dtype=torch.int32, device="cpu")
        """`(K, P)`: pool slots."""
        self.lengths = torch.zeros((heads, width), dtype=torch.int32, device="cpu")
        """`(K, P)`: tokens of each page that are attended to."""
        self._parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def copy(self, heads: torch.Tensor, chunks: torch.Tensor, slots: torch.Tensor) -> None:
        """Plan to copy chunk `chunks[i]` of head `heads[i]` to pool slot `slots[i]`, all `(m,)` int64."""
        self._parts.append((heads, chunks, slots))

    def attend(self, heads: torch.Tensor, chunks: range, slots: range, column: int) -> None:
        """Plan to copy the same `chunks` of each of `heads`, and list them in the table from `column` on: all of their
        tokens are attended to. slots: of the first head's chunks, then the next one's. Does nothing for no head."""
        if len(heads) == 0:  # the table may be too narrow
            return
        places = numbers(slots).view(len(heads), len(chunks))
        columns = slice(column, column + len(chunks))
        self.table[heads, columns] = places.int()
        self.lengths[heads, columns] = self._c
        self.copy(heads.repeat_interleave(len(chunks)), numbers(chunks).repeat(len(heads)), places.flatten())

    def copies(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Heads, chunks and slots of all copies, `(m,)` each."""
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        heads, chunks, slots = (torch.cat(part) for part in zip((none, none, none), *self._parts, strict=True))
        return heads, chunks, slots


def numbers(of: range) -> torch.Tensor:
    """A range as int64 on the host."""
    return torch.arange(of.start, of.stop, dtype=torch.int64, device="cpu")
