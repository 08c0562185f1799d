"""Compiling the kernels of a session's steps before its first question is asked.

Every wrapper is called with tensors on the meta device (`variants.launch`), so what is compiled is what the same call
with data asks for. Sizes that only a question determines do not matter, but for the few blocks that depend on them:
these are tried up to the largest that the prompt allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tieredkv.codecs.base import Codec, Fit
from tieredkv.ops.base import Expected, Listing, Pages
from tieredkv.ops.triton import adapt, attend, choose, copy, mass, rank
from tieredkv.policy.digests import Fitted

META = torch.device("meta")
FEW = 2
"""Rows, columns and slots where their number does not matter."""


@dataclass(frozen=True, slots=True)
class _Records:
    """A host tier's records: a `Source` of which nothing is read."""

    codec: Codec
    records: torch.Tensor

    def fetch(self, heads: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def preparations(expected: Expected) -> Iterator[Callable[[], object]]:
    """As `Ops.preparations`: what the first step needs first."""
    k, group, d = expected.kv_heads, expected.heads // expected.kv_heads, expected.digest.head_dim
    numbers = partial(torch.empty, dtype=torch.float32, device=META)
    ids = partial(torch.empty, dtype=torch.int32, device=META)
    counts = partial(torch.empty, dtype=torch.int64, device=META)
    table, page_lse, lse = ids(k, FEW), numbers(expected.heads, FEW), numbers(k, group)
    query = torch.empty((expected.heads, 1, d), dtype=expected.dtype, device=META)
    token = torch.empty((k, d), dtype=expected.dtype, device=META)
    blocks = _lengths(expected.chunks)
    for source, pages in _stored(expected):
        yield partial(copy.fetch, source, pages, counts(FEW), counts(FEW), counts(FEW))
        yield partial(copy.keep, source, pages, 0, counts(FEW), counts(FEW))
        yield partial(copy.append, token, token, pages, table, table, ids(k, 2))
        for written in (None, page_lse):
            yield partial(
                attend.paged_attention, query, pages, table, table, 1.0, page_lse=written, dtype=expected.dtype
            )
        tables = ids(k, FEW), ids(k, FEW), ids(k, FEW + 1)
        yield partial(copy.gather, source, pages, counts(k), ids(k, FEW), ids(k, FEW), ids(k), *tables, 0)
    yield partial(_rank, expected)
    for chunks in blocks:
        logits, slot_of = numbers(k, group, chunks), ids(k, chunks + 1)
        chosen = torch.empty((k, chunks), dtype=torch.bool, device=META)
        used = ids(k, chunks), ids(k, chunks), ids(k, chunks), ids(k)
        for order in (None, ids(k, chunks)):
            yield partial(choose.choose, logits[:, 0].contiguous(), counts(k), slot_of, FEW, chosen, order)
            listing = None if order is None else Listing(table, counts(k), 0, order)
            yield partial(choose.place, chosen, chosen, ids(k, FEW), ids(k), *used, counts(k), listing)
        if expected.digest.estimates_mass:
            yield partial(mass.log_mass_without, logits, chosen, numbers(k, group))
    if expected.digest.estimates_mass:
        unseen, total = numbers(k), torch.empty(k, dtype=torch.float64, device=META)
        yield partial(mass.record_unseen, numbers(k, group), lse, counts(k), unseen, total)
        some = counts(k)
        yield partial(adapt.adapt, some, unseen, some, some, some, table, some, 0, 1, expected.digest.chunk_tokens)
    none = torch.empty((k, FEW), dtype=torch.bool, device=META)
    yield partial(mass.add_mass, numbers(FEW), page_lse, lse, none, ids(k, FEW), counts(k), 0)


def _stored(expected: Expected) -> Iterator[tuple[_Records, Pages]]:
    """A host tier and pages of every pair of codecs."""
    for stored, codec in expected.codecs:
        records = torch.empty((expected.kv_heads, FEW, stored.chunk_bytes), dtype=torch.uint8, device=META)
        fit = torch.empty((expected.kv_heads, 2, codec.head_dim), dtype=torch.float32, device=META)
        pool = torch.empty((FEW, codec.chunk_bytes), dtype=torch.uint8, device=META)
        yield _Records(stored, records), Pages(codec, pool, Fit(fit, fit) if codec.needs_fit else None)


def _lengths(most: int) -> list[int]:
    """Lengths of rows, one for each block that a kernel may take for rows of up to `most` numbers."""
    lengths = [choose.LARGEST_BLOCK // 16]
    while lengths[-1] < min(most, choose.LARGEST_BLOCK):
        lengths.append(4 * lengths[-1])
    return lengths


def _rank(expected: Expected) -> None:
    """Logits from digests, and ranks from logits."""
    k, d = expected.kv_heads, expected.digest.head_dim
    digest: Any = rank.by_kernels(expected.digest)
    query = torch.empty((k, expected.heads // k, d), dtype=expected.dtype, device=META)
    heads, chosen = torch.empty(k, dtype=torch.int64, device=META), torch.empty((k, 16), dtype=torch.bool, device=META)
    prepared, _ = digest.project(query, heads, 1.0, _fitted(expected))
    digests = torch.empty((k, 16, digest.chunk_bytes), dtype=torch.uint8, device=META)
    logits, parts = digest.logits_in_parts(prepared, digests, 16)
    rank.chunk_ranks(logits, chosen, expected.group, expected.stay, parts)


def _fitted(expected: Expected) -> Fitted:
    """What ranking needs of a digest that is fitted to something: of the right types and shapes."""
    k, digest = expected.kv_heads, expected.digest
    eye = torch.eye(digest.head_dim, dtype=torch.float32, device="cpu").expand(k, -1, -1)
    fitted: Fitted = digest.fit(eye, eye)
    return fitted.for_ranking(torch.arange(k, device="cpu")).to(META)
