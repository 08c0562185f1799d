"""Ops: the operations of a decoding step, and what every implementation of them guarantees.

`torch_ops` implements them in plain torch, `ops.triton` by kernels; `ops.select` chooses.

Shapes: `n` dynamic heads, `N` chunks, `R` retrieval slots of a head, `m` chunks that a head may be given in a step, `H`
query heads, `K` KV heads, `G = H // K`, `P` columns of a page table, `S` slots of the pool, `C` page tokens (a chunk
fills a page), `D` head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tieredkv.codecs.base import Codec, Fit
from tieredkv.policy.digests import Digest


class Source(Protocol):
    """The chunks of one layer in the host tier (`memory.host.HostLayer`)."""

    @property
    def codec(self) -> Codec:
        """Of its records."""

    @property
    def records(self) -> torch.Tensor | None:
        """All of them, `(K, chunks, B)` uint8 on the host, those of a head contiguous; page-locked if kernels are to
        read them. None: they are not in memory, and only `fetch` reads them."""

    def fetch(self, heads: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
        """A copy `(m, B)` of the records `chunks[i]` of `heads[i]`, both `(m,)` on the host."""


@dataclass(frozen=True, slots=True)
class Pages:
    """The pool as one layer's heads read and write it."""

    codec: Codec
    """Of the pages. It is the source's, or the source has the model's own dtype and chunks are encoded on the way."""
    records: torch.Tensor
    """`(S, B)` uint8: the whole pool."""
    fit: Fit | None
    """The layer's, on the device; None if the codec needs none."""


class Ops(Protocol):
    """The operations of a decoding step.

    Tensors are on the pool's device and belong to the caller; results are new. There is at least one head and one
    chunk. Records are copied as they are where source and pages have the same codec.
    """

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def capturable(self) -> bool:
        """Whether a step can be captured in a CUDA graph: on a card, no operation waits for the host."""

    def digest(self, digest: Digest[Any]) -> Digest[Any]:
        """The digest by this implementation's kernels, found by its name; `digest` itself if there are none."""

    def chunk_ranks(self, logits: torch.Tensor, chosen: torch.Tensor, group: str, stay: float) -> torch.Tensor:
        """Ranks `(n, N)` float32 of chunks, from the logits `(n, G, N)` of a head's query heads.

        group: the rule of `policy.select.GROUPS`. chosen `(n, N)` bool: chunks that the previous step attended to;
        their ranks are multiplied by `stay`.
        """

    def log_mass_without(self, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Log-sum-exp `(n, G)` of logits `(n, G, N)` over all chunks but the chosen `(n, N)`."""

    def add_mass(
        self, chunk_mass: torch.Tensor, logits: torch.Tensor, shift: torch.Tensor, chosen: torch.Tensor
    ) -> None:
        """Add to `chunk_mass` `(N,)` the sum of `exp(logits + shift)` over all queries of the heads that chose a chunk.

        logits `(n, G, N)`, shift `(n, G)`, chosen `(n, N)` bool.
        """

    def choose(
        self, ranks: torch.Tensor, selected: torch.Tensor, slot_of: torch.Tensor, most: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose the `selected` `(n,)` best chunks of each head by `ranks` `(n, N)`; find those that are in no slot.

        selected: at most `most`; 0 chooses none. slot_of `(n, >= N)`: -1 for none. Returns chosen `(n, N)` bool, missed
        `(n, most)` int32 chunk ids, ascending, and misses `(n,)` int32, how many of them count. Which of several equal
        ranks are chosen is up to the implementation.
        """

    def place(
        self,
        wanted: torch.Tensor,
        kept: torch.Tensor,
        misses: torch.Tensor,
        chunk_in: torch.Tensor,
        last_used: torch.Tensor,
        slots: torch.Tensor,
        step: torch.Tensor,
        most: int,
        table: torch.Tensor | None,
        heads: torch.Tensor,
        first: int,
    ) -> torch.Tensor:
        """Find slots for missed chunks, mark the slots in use, and list those in the page table.

        wanted `(n, N)` bool: chunks whose slots are in use now. kept `(n, N)` bool: chunks whose slots must not be
        given away; includes the wanted ones. misses `(n,)`: slots needed, at most `most`. chunk_in, last_used, slots
        `(n, R)`: of `Residency`; `last_used` is set to `step` `(1,)` where a slot is in use. Slots are taken in order
        of last use, oldest first, then by number. table `(K, P)` int32: row `heads` gets the pool slots of the head's
        wanted chunks, from column `first` on; None: nothing is listed.

        Returns victims `(n, most)` int32, local slots, ascending, of which the first `misses` count. Where too few
        slots may be taken, torch raises ValueError; a kernel cannot, and its result is undefined.
        """

    def gather(
        self,
        source: Source,
        pages: Pages,
        heads: torch.Tensor,
        missed: torch.Tensor,
        victims: torch.Tensor,
        misses: torch.Tensor,
        slots: torch.Tensor,
        chunk_in: torch.Tensor,
        slot_of: torch.Tensor,
        first_chunk: int,
    ) -> None:
        """Copy each missed chunk into its victim's slot, and enter it in the tables of `Residency`.

        heads `(n,)`. missed, victims `(n, m)`, of which the first `misses` `(n,)` count. Chunk
        ids count from `first_chunk` of the source.
        """

    def fetch(
        self,
        source: Source,
        pages: Pages,
        heads: torch.Tensor,
        chunks: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """Copy chunk `chunks[i]` of head `heads[i]` into pool slot `slots[i]`, all `(m,)`. m may be 0.

        heads and chunks may be on the host.
        """

    def append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        pages: Pages,
        table: torch.Tensor,
        lengths: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        """Write one token's keys and values `(K, D)` after the `count` `(1,)` int32 tokens of the recent region.

        The region's pages are the first columns of `table` `(K, P)`. Updates lengths `(K, P)`, the tokens of each page
        that count, but not `count`.
        """

    def keep(
        self,
        source: Source,
        pages: Pages,
        head: int,
        tokens: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """Copy single tokens `(b,)` of one head from the source into pages `slots` `(>= b / C,)`, one after another.

        tokens may be on the host. b may be 0.
        """

    def paged_attention(
        self,
        query: torch.Tensor,
        pages: Pages,
        table: torch.Tensor,
        lengths: torch.Tensor,
        scaling: float,
        batch_pages: int,
        page_lse: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over pages that differ from head to head: output `(H, n, D)` and lse `(H, n)`, float32.

        query `(H, n, D)`: here n query tokens, all of which see the same keys. table `(K, P)`: pages of each head in
        any order. lengths `(K, P)`: how many of a page's first tokens count; the rest must be finite. 0: the entry is
        ignored. A head without any token is an error: torch raises ValueError, a kernel's result is undefined.
        batch_pages: pages to gather at a time, at least one per KV head, which bounds the scratch; an implementation
        that gathers nothing ignores it.

        page_lse `(H, >= P)` float32, only if n is 1: is set to the log-sum-exp of each page's logits, to a number below
        -1e30 where no token of a page counts; what lies beyond the P columns is left as it is.
        """
