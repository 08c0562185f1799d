"""Ops: the operations of a decoding step, and what every implementation of them guarantees.

`torch_ops` implements them in plain torch, `ops.triton` by kernels; `ops.select` chooses.

Shapes: `n` dynamic heads, `N` chunks, `R` retrieval slots of a head, `m` chunks that a head may be given in a step, `H`
query heads, `K` KV heads, `G = H // K`, `P` columns of a page table, `S` slots of the pool, `C` page tokens (a chunk
fills a page), `D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


@dataclass(frozen=True, slots=True)
class Listing:
    """Where a step lists the pages of the chunks that its heads attend to."""

    table: torch.Tensor
    """`(K, P)` int32: pool slots."""
    heads: torch.Tensor
    """`(n,)`: the rows of the table."""
    first: int
    """The column from which on they are listed."""
    order: torch.Tensor
    """`(n, N)` int32: how many columns after the first each chunk in use is listed (`Ops.choose`)."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the steps of a session may be like, as far as it is known before its first question."""

    heads: int
    """H."""
    kv_heads: int
    """K, of the layer with the most."""
    dtype: torch.dtype
    """Of queries, keys and values."""
    codecs: tuple[tuple[Codec, Codec], ...]
    """Of the host tier and of pages: the pairs that there may be."""
    digest: Digest[Any]
    group: str
    """The rule of `policy.select.GROUPS`."""
    stay: float
    """As `Ops.chunk_ranks` takes it."""
    chunks: int
    """N at most."""


class Ops(Protocol):
    """The operations of a decoding step.

    Tensors are on the pool's device and belong to the caller; results are new. There is at least one head and one
    chunk. Records are copied as they are where source and pages have the same codec.

    On a card each is one launch, but `chunk_ranks` without parts and `paged_attention`, which are two, or three with
    pages of 4 bits. What a step leaves for the next is advanced where it is used, so there is a counter for each
    program that may advance it.
    """

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def capturable(self) -> bool:
        """Whether a step can be captured in a CUDA graph: on a card, no operation waits for the host."""

    def preparations(self, expected: Expected) -> Iterable[Callable[[], object]]:
        """What to call so that no step or seal waits for a compiler: in any order, at any time, on any thread. Launches
        nothing and touches no data. For the current card; nothing where nothing is compiled."""

    def digest(self, digest: Digest[Any]) -> Digest[Any]:
        """The digest by this implementation's kernels, found by its name; `digest` itself if there are none."""

    def chunk_ranks(
        self,
        logits: torch.Tensor,
        chosen: torch.Tensor,
        group: str,
        stay: float,
        parts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Ranks `(n, N)` float32 of chunks, from the logits `(n, G, N)` of a head's query heads.

        group: the rule of `policy.select.GROUPS`. chosen `(n, N)` bool: chunks that the previous step attended to;
        their ranks are multiplied by `stay`. parts `(n, G, any)` float32: of `Digest.logits_in_parts`, if it was made
        with the logits.
        """

    def log_mass_without(
        self, logits: torch.Tensor, chosen: torch.Tensor, constant: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Log-sum-exp `(n, G)` of logits `(n, G, N)` over all chunks but the chosen `(n, N)`, plus `constant`
        `(n, G)`."""

    def record_unseen(
        self,
        unselected: torch.Tensor,
        lse: torch.Tensor,
        heads: torch.Tensor,
        unseen: torch.Tensor,
        total: torch.Tensor,
    ) -> None:
        """Set `unseen` `(n,)` float32 to the share of attention mass that a step did not see, as
        `policy.select.unseen_share`, and add it to `total` `(n,)` float64.

        unselected `(n, G)`: log-sum-exp of the logits not attended to. lse `(K, G)`: of all that were, whose rows
        `heads` `(n,)` count.
        """

    def adapt(
        self,
        selected: torch.Tensor,
        unseen: torch.Tensor,
        least: torch.Tensor,
        most: torch.Tensor,
        total: torch.Tensor,
        lengths: torch.Tensor,
        heads: torch.Tensor,
        first: int,
        columns: int,
        full: int,
    ) -> None:
        """Set `selected` `(n,)` int64 as `policy.select.adapted` does, and add it to `total` `(n,)` int64.

        unseen `(n,)` float32, least, most `(n,)` int64. Of the rows `heads` `(n,)` of lengths `(K, P)` int32, `columns`
        columns, from `first` on, are set: as many as are selected to `full`, the rest to 0.
        """

    def add_mass(
        self,
        chunk_mass: torch.Tensor,
        page_lse: torch.Tensor,
        lse: torch.Tensor,
        chosen: torch.Tensor,
        columns: torch.Tensor,
        heads: torch.Tensor,
        first: int,
    ) -> None:
        """Add to `chunk_mass` `(N,)` the attention mass of each chunk that a step attended to, summed over the queries
        of the heads that chose it, in the same order at every run.

        page_lse `(H, >= P)`: of `paged_attention`. lse `(K, G)`: likewise. chosen `(n, N)` bool: the chunks; the page
        of each is in column `first` and as many after as columns `(n, >= N)` int32 says. heads `(n,)`: rows of the
        table.
        """

    def choose(
        self,
        ranks: torch.Tensor,
        selected: torch.Tensor,
        slot_of: torch.Tensor,
        most: int,
        chosen: torch.Tensor,
        order: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the `selected` `(n,)` best chunks of each head by `ranks` `(n, N)`; find those that are in no slot.

        selected: at most `most`; 0 chooses none. slot_of `(n, >= N)`: -1 for none. chosen `(n, N)` bool: is set to the
        choice. order `(n, N)` int32: is set, for each chosen chunk, to how many before it are chosen. Returns missed
        `(n, most)` int32 chunk ids, ascending, and misses `(n,)` int32, how many of them count. Which of several equal
        ranks are chosen is up to the implementation, but does not depend on `slot_of`.
        """

    def place(
        self,
        wanted: torch.Tensor,
        kept: torch.Tensor,
        missed: torch.Tensor,
        misses: torch.Tensor,
        chunk_in: torch.Tensor,
        last_used: torch.Tensor,
        slots: torch.Tensor,
        step: torch.Tensor,
        total: torch.Tensor,
        listing: Listing | None,
    ) -> torch.Tensor:
        """Find slots for missed chunks, mark the slots in use, and list those in the page table.

        wanted `(n, N)` bool: chunks whose slots are in use now. kept `(n, N)` bool: chunks whose slots must not be
        given away; includes the wanted ones. missed `(n, m)`, misses `(n,)`: of `choose`; misses are added to `total`
        `(n,)` int64. chunk_in, last_used, slots `(n, R)`: of `Residency`. Slots are taken in order of last use, oldest
        first, then by number. listing: where the pool slots of each head's wanted chunks are listed; None: nothing is.
        They are listed in the order of the chunks, so that a step's output does not depend on which slots these are in.
        step `(n,)` int32: steps begun by each head; with a listing, one more begins. `last_used` is set to it where a
        slot is in use.

        Returns victims `(n, m)` int32, local slots, ascending, of which the first `misses` count: the k-th is for the
        k-th missed chunk. Where too few slots may be taken, torch raises ValueError; a kernel cannot, and its result is
        undefined.
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
        """Write one token's keys and values `(K, D)` after the tokens of the recent region.

        count `(K, 2)` int32: how many these are, the same for the keys and the values of every head; advanced by one.
        The region's pages are the first columns of `table` `(K, P)`. Updates lengths `(K, P)`, the tokens of each page
        that count.
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
        dtype: torch.dtype = torch.float32,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over pages that differ from head to head: output `(H, n, D)` of `dtype` and lse `(H, n)` float32.

        query `(H, n, D)`: here n query tokens, all of which see the same keys. table `(K, P)`: pages of each head in
        any order. lengths `(K, P)`: how many of a page's first tokens count; the rest must be finite. 0: the entry is
        ignored. A head without any token is an error: torch raises ValueError, a kernel's result is undefined.
        batch_pages: pages to gather at a time, at least one per KV head, which bounds the scratch; an implementation
        that gathers nothing ignores it.

        page_lse `(H, >= P)` float32, only if n is 1: is set to the log-sum-exp of each page's logits, to a number below
        -1e30 where no token of a page counts or all of its mass is negligible; what lies beyond the P columns is left
        as it is. Output and lse are the same with and without it.
        """
