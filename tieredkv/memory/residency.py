"""Which chunk of a dynamic head is in which of its slots, which one gives way, and the copies that follow.

`Residency` holds the tables of one layer. The functions below work on them in plain torch; `tieredkv.kernels` has a
kernel for each, of the same signature. Shapes: `n` dynamic heads, `N` chunks, `R` retrieval slots of a head, `m` chunks
a head may be given in a step, `K` KV heads, `P` columns of a page table, `S` slots of the pool, `C` page tokens, `D`
head dim.
"""

from __future__ import annotations

import torch

from tieredkv.packing import AT_ONCE, Packing, pack

NEVER = torch.iinfo(torch.int32).max
"""Last use of a slot that must not give way."""


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


def _listed(mask: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Columns set in each row of a mask, ascending, `(rows, width)` int32, and how many; row and place of each."""
    counts = mask.sum(1)
    row, column = mask.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=mask.device) - (counts.cumsum(0) - counts)[row]
    out = torch.zeros((mask.shape[0], width), dtype=torch.int32, device=mask.device)
    out[row, place] = column.int()
    return out, counts.int(), row, place


def choose(
    ranks: torch.Tensor, selected: torch.Tensor, slot_of: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best `selected` `(n,)` chunks of each head by ranks `(n, N)`, and those of them that are in no slot.

    slot_of `(n, >= N)`, -1 for none. Returns chosen `(n, N)` bool, missed `(n, most)` chunk ids, ascending, of which
    the first misses `(n,)` count. Of chunks that rank alike, any are chosen.
    """
    best = ranks.topk(most, dim=1).indices
    taken = torch.arange(most, device=ranks.device) < selected.unsqueeze(1)
    chosen = torch.zeros_like(ranks, dtype=torch.bool).scatter_(1, best, taken)
    missed, misses, _, _ = _listed(chosen & (slot_of[:, : ranks.shape[1]] < 0), most)
    return chosen, missed, misses


def place(
    wanted: torch.Tensor,
    kept: torch.Tensor,
    misses: torch.Tensor,
    chunk_in: torch.Tensor,
    last_used: torch.Tensor,
    slots: torch.Tensor,
    clock: torch.Tensor,
    most: int,
    table: torch.Tensor | None,
    heads: torch.Tensor,
    first: int,
) -> torch.Tensor:
    """Slots for missed chunks; marks the slots that are used and lists them in the page table.

    wanted `(n, N)`: chunks whose slots are used now; kept `(n, N)`: chunks whose slots must not give way, the wanted
    among them. misses `(n,)`. chunk_in, last_used `(n, R)`: read, and `clock` `(1,)` written where a slot is used.
    slots `(n, R)`: of the pool, -1 for none. Victims are the slots used longest ago, the first of those used equally
    long ago. table `(K, P)` int32: gets the pool slots of a head's wanted chunks from column `first` of row `heads` on.
    Returns victims `(n, most)`, local slots, ascending, of which the first `misses` count. ValueError if too few slots
    may give way; a kernel cannot raise it.
    """
    held = chunk_in.long().clamp(min=0)
    there = chunk_in >= 0
    age = last_used.masked_fill((there & kept.gather(1, held)) | (slots < 0), NEVER)
    if bool((misses > (age != NEVER).sum(1)).any()):
        raise ValueError("more chunks wanted than fit the slots that may give way")
    order = age.argsort(dim=1, stable=True)
    gone = torch.arange(slots.shape[1], device=slots.device) < misses.unsqueeze(1)
    victim = torch.zeros_like(gone).scatter_(1, order, gone)
    victims, _, _, _ = _listed(victim, most)
    used = victim | (there & wanted.gather(1, held))
    last_used.copy_(torch.where(used, clock, last_used))
    if table is not None:
        local, _, row, column = _listed(used, slots.shape[1])
        table[heads[row], first + column] = slots[row, local[row, column].long()]
    return victims


def gather(
    arena: torch.Tensor,
    pages: torch.Tensor,
    heads: torch.Tensor,
    missed: torch.Tensor,
    victims: torch.Tensor,
    misses: torch.Tensor,
    slots: torch.Tensor,
    chunk_in: torch.Tensor,
    slot_of: torch.Tensor,
    first_chunk: int,
    packing: Packing | None = None,
) -> None:
    """Copy every missed chunk into its victim's slot and enter it in the tables.

    arena `(K, chunks, 2, C, D)` in host memory, pages `(S, 2, C, D)`, heads `(n,)`. missed, victims `(n, m)`, of which
    the first `misses` `(n,)` count. Chunk ids count from `first_chunk` of the arena. packing: of pages in 8 bits.
    """
    there = torch.arange(missed.shape[1], device=missed.device) < misses.unsqueeze(1)
    row, place = there.nonzero(as_tuple=True)
    chunk, local = missed[row, place].long(), victims[row, place].long()
    fetch(arena, pages, heads[row], chunk + first_chunk, slots[row, local], packing)
    slot_of[row, chunk_in[row, local].long()] = -1  # of a slot that was empty: the last place, which stands for none
    chunk_in[row, local] = chunk.int()
    slot_of[row, chunk] = local.int()


def fetch(
    arena: torch.Tensor,
    pages: torch.Tensor,
    heads: torch.Tensor,
    chunks: torch.Tensor,
    slots: torch.Tensor,
    packing: Packing | None = None,
) -> None:
    """Copy chunk `chunks[i]` of head `heads[i]` into pool slot `slots[i]`, all `(m,)`. packing: of pages in 8 bits."""
    here = heads.to(arena.device), chunks.to(arena.device)
    if packing is None:
        pages[slots] = arena[here].to(pages.device)
        return
    chunks_at_once = max(1, AT_ONCE // arena.shape[3])
    for head, chunk, slot in zip(*(ids.split(chunks_at_once) for ids in (*here, slots)), strict=True):
        tokens, norms = arena[head, chunk].to(pages.device), packing.norms[head.to(pages.device)].unsqueeze(2)
        pages[slot], packing.scales[slot] = pack(tokens, norms)


def append(
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    held: torch.Tensor,
    packing: Packing | None = None,
) -> None:
    """Write a token's key and value `(K, D)` behind the `held` `(1,)` tokens of the recent region.

    Its pages are the first columns of `table` `(K, P)`; lengths `(K, P)`: how many tokens of a page count. `held` is
    left as it was. packing: of pages in 8 bits.
    """
    column, place = divmod(int(held), pages.shape[2])
    slots = table[:, column].long()
    token = torch.stack((keys, values), dim=1)
    if packing is None:
        pages[slots, :, place] = token
    else:
        pages[slots, :, place], packing.scales[slots, :, place] = pack(token, packing.norms)
    lengths[:, column] = place + 1


def keep(
    arena: torch.Tensor,
    pages: torch.Tensor,
    head: int,
    tokens: torch.Tensor,
    slots: torch.Tensor,
    packing: Packing | None = None,
) -> None:
    """Put keys and values of single tokens `(b,)` of one head of the arena into pages `slots` `(>= b / C,)`, one behind
    the other. packing: of pages in 8 bits.
    """
    c = pages.shape[2]
    write(arena[head, tokens // c, :, tokens % c], pages, head, slots, packing)


def write(
    tokens: torch.Tensor, pages: torch.Tensor, head: int, slots: torch.Tensor, packing: Packing | None = None
) -> None:
    """Put keys and values `(b, 2, D)` of one head into its pages `slots` `(>= b / C,)`, one behind the other."""
    place = torch.arange(len(tokens), device=pages.device)
    page, within = slots[place // pages.shape[2]], place % pages.shape[2]
    if packing is None:
        pages[page, :, within] = tokens.to(pages)
        return
    for part, at, to in zip(*(each.split(AT_ONCE) for each in (tokens, page, within)), strict=True):
        pages[at, :, to], packing.scales[at, :, to] = pack(part.to(pages.device), packing.norms[head])
