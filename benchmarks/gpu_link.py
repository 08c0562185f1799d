"""The link between host and card by itself: large copies, and the gather of a decoding step at the shipped chunk size.

Memory is page-locked as the host tier is (registered after allocation), by torch's own allocator, and with huge pages.
Launches are captured in a graph and replayed, each with other chunks, so that neither Python nor a cache of the card is
measured.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_record import Fact, Run, Values, card_state
from synthetic import milliseconds

from tieredkv import TierConfig
from tieredkv.codecs import CODECS, codec_for
from tieredkv.codecs.base import Codec, Fit
from tieredkv.memory.pagelock import PageLocker, aligned
from tieredkv.ops import torch_ops
from tieredkv.ops.base import Pages, Source
from tieredkv.ops.select import ops_for

HEADS, HEAD_DIM = 4, 128
LAUNCHES, ROUNDS = 16, 8
MISSES = (655, 164)
"""Chunks that a layer of the 7B shape misses in a step at 131,072 tokens, a twentieth attended to, 80 and 95 % hits."""


def facts(run: Run) -> list[Fact]:
    return [
        Fact("copies", 20, partial(copies, run)),
        Fact("gather", 50, partial(gathers, run, "registered")),
        Fact("gather, huge pages", 20, partial(gathers, run, "huge pages")),
        Fact("card", 20, partial(card, run)),
        Fact("gather by the host", 15, partial(by_host, run)),
    ]


# ---- memory


@contextmanager
def locked(run: Run, nbytes: int, kind: str) -> Iterator[tuple[torch.Tensor, Values]]:
    """Page-locked host memory, int16: "registered" as the host tier, "huge pages", or by torch ("pinned")."""
    begin = time.perf_counter()
    if kind == "pinned":
        memory = torch.empty(nbytes // 2, dtype=torch.int16, pin_memory=not run.dry)
    elif kind == "huge pages":
        region = mmap.mmap(-1, nbytes + 2**21)
        region.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(region, dtype=torch.uint8)
        first = -whole.data_ptr() % 2**21
        memory = whole[first : first + nbytes].view(torch.int16)
    else:
        memory = aligned((nbytes // 2,), torch.int16)
    memory.zero_()
    touched = time.perf_counter()
    locker = None
    if not (run.dry or kind == "pinned"):
        locker = PageLocker()
        locker.use(torch.device("cuda"))
        locker.lock(memory)
        if refusal := locker.refusal():
            raise RuntimeError(refusal)
    lock_s = time.perf_counter() - touched
    try:
        yield memory, {"memory": kind, "touch_s": touched - begin, "lock_s_per_gib": lock_s / nbytes * 2**30}
    finally:
        run.synchronize()
        if locker is not None:
            locker.close()


# ---- timing


def replayed(run: Run, launches: list[Callable[[], object]]) -> tuple[float, str]:
    """Median milliseconds of all launches one after another, and how they ran: "graph", or eager and why."""

    def together() -> None:
        for launch in launches:
            launch()

    together()
    if run.dry:
        return milliseconds(together, 2, "cpu"), "eager"
    run.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            together()
    except RuntimeError as error:
        return milliseconds(together, ROUNDS, "cuda"), f"eager: {str(error).splitlines()[0]}"
    return milliseconds(graph.replay, ROUNDS, "cuda"), "graph"


@contextmanager
def copying(programs: int | None = None, pieces: int | None = None) -> Iterator[Values]:
    """Inside the block, gathers have so many programs, each of which copies so many chunks at a time; None: as shipped.
    Yields both numbers."""
    from tieredkv.ops.triton import copy

    shipped = copy.PROGRAMS, copy.PIECES
    copy.PROGRAMS, copy.PIECES = programs or shipped[0], pieces or shipped[1]
    try:
        yield {"programs": copy.PROGRAMS, "at_a_time": copy.PIECES}
    finally:
        copy.PROGRAMS, copy.PIECES = shipped


# ---- what is measured


def copies(run: Run) -> Iterator[Values]:
    """Large copies each way."""
    nbytes = 2**20 if run.dry else 2**28
    device = torch.empty(nbytes // 2, dtype=torch.int16, device=run.device)
    for kind in ("registered", "pinned", "huge pages"):
        with locked(run, nbytes, kind) as (host, told):
            down = milliseconds(partial(device.copy_, host, non_blocking=True), 5, run.device)
            up = milliseconds(partial(host.copy_, device, non_blocking=True), 5, run.device)
            yield {**told, "bytes": nbytes, "h2d_gb_s": nbytes / down / 1e6, "d2h_gb_s": nbytes / up / 1e6}
    if not run.dry:
        yield {"memory": "state of the link after copies", **card_state()}


@dataclass(frozen=True, slots=True)
class Chunks:
    """A `Source`: records `(K, chunks, B)` of page-locked memory."""

    codec: Codec
    records: torch.Tensor

    def fetch(self, heads: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
        return self.records[heads, chunks]


def chunks_in(host: torch.Tensor, bits: int, tokens: int) -> Chunks:
    """All of page-locked memory as chunks of so many tokens."""
    codec = codec_for(bits, tokens, HEAD_DIM, torch.bfloat16)
    memory = host.view(torch.uint8)
    count = len(memory) // (HEADS * codec.chunk_bytes)
    return Chunks(codec, memory[: HEADS * count * codec.chunk_bytes].view(HEADS, count, codec.chunk_bytes))


def pool(source: Source, slots: int, page_bits: int, device: torch.device) -> Pages:
    """An empty pool for the source's heads."""
    assert source.records is not None
    codec = codec_for(page_bits, source.codec.chunk_tokens, source.codec.head_dim, source.codec.dtype)
    common = torch.ones(len(source.records), 2, codec.head_dim, device=device)
    records = torch.empty((slots, codec.chunk_bytes), dtype=torch.uint8, device=device)
    return Pages(codec, records, Fit(common, common) if codec.needs_fit else None)


def gather_ms(
    run: Run, sources: Sequence[Source], pieces: int, page_bits: int, launches: int = LAUNCHES
) -> tuple[float, str]:
    """Milliseconds of one gather of `pieces` random chunks from sources, taken in turn, to pages of `page_bits`."""
    ops, device = ops_for(torch.device(run.device)), torch.device(run.device)
    if run.dry:
        pieces, launches = max(1, pieces // 64), 2
    pages, slots = pool(sources[0], pieces, page_bits, device), torch.arange(pieces, device=device)

    def launch(source: Source) -> Callable[[], object]:
        assert source.records is not None
        heads, chunks, _ = source.records.shape
        head = torch.randint(heads, (pieces,), device=device)
        chunk = torch.randint(chunks, (pieces,), device=device)
        return lambda: ops.fetch(source, pages, head, chunk, slots)

    ms, path = replayed(run, [launch(sources[i % len(sources)]) for i in range(launches)])
    return ms / launches, path


def gathers(run: Run, kind: str) -> Iterator[Values]:
    """The shipped chunk size by programs and number of pieces; then larger chunks."""
    c = TierConfig().chunk_tokens
    with locked(run, 2**22 if run.dry else 2**29, kind) as (host, told):

        def one(
            tokens: int, pieces: int, bits: tuple[int, int], programs: int | None = None, at: int | None = None
        ) -> Values:
            source, (host_bits, page_bits) = chunks_in(host, bits[0], tokens), bits
            piece = source.codec.chunk_bytes
            with copying(programs, at) as how:
                ms, path = gather_ms(run, [source], pieces, page_bits)
            done: Values = {"memory": told["memory"], "piece_bytes": piece, "pieces": pieces}
            done |= {"host_kv_bits": host_bits, "page_bits": page_bits, **how}
            return {**done, "gb_s": pieces * piece / ms / 1e6, "us": 1000 * ms, "path": path}

        host.view(torch.bfloat16).copy_(torch.randn(2**16, dtype=torch.bfloat16).repeat(len(host) // 2**16))
        for programs in (12, 24, 48, 96):
            for bits in ((16, 8), (16, 16), (8, 8), (4, 4)):
                yield one(c, MISSES[0], bits, programs)
        if kind == "registered":
            for pieces in (64, 256, 4096):
                for bits in ((16, 8), (8, 8), (4, 4)):
                    yield one(c, pieces, bits)
            for at in (1, 2, 8):
                for programs in (24, 96, 264):
                    for bits in ((16, 8), (4, 4)):
                        yield one(c, MISSES[0], bits, programs, at)
            for tokens, pieces in ((4 * c, MISSES[0]), (16 * c, 256)):
                yield one(tokens, pieces, (16, 8))


def by_host(run: Run) -> Iterator[Values]:
    """What is used where kernels cannot read host memory: a gather on the host and one copy."""
    c, device = TierConfig().chunk_tokens, torch.device(run.device)
    with locked(run, 2**22 if run.dry else 2**29, "registered") as (host, _):
        for bits in CODECS:
            source = chunks_in(host, bits, c)
            for pieces in MISSES:
                pages, slots = pool(source, pieces, bits, device), torch.arange(pieces, device=device)
                head, chunk = torch.randint(HEADS, (pieces,)), torch.randint(source.records.shape[1], (pieces,))
                ms = milliseconds(partial(torch_ops.fetch, source, pages, head, chunk, slots), 5, run.device)
                told: Values = {"host_kv_bits": bits, "pieces": pieces, "piece_bytes": source.codec.chunk_bytes}
                yield {**told, "us": 1000 * ms, "gb_s": pages.records.nbytes / ms / 1e6}


def card(run: Run) -> Iterator[Values]:
    """The card's own ceilings: a copy in its memory, a large product, a matrix times a vector."""
    size = 2**10 if run.dry else 2**13
    one = torch.randn(size, size, dtype=run.dtype, device=run.device)
    other, vector = torch.randn_like(one), torch.randn(size, 1, dtype=run.dtype, device=run.device)
    source = torch.empty(2**20 if run.dry else 2**32, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    ms = milliseconds(partial(target.copy_, source), 5, run.device)
    yield {"what": "copy in the card's memory, bytes read and written", "gb_s": 2 * source.nbytes / ms / 1e6}
    ms = milliseconds(partial(torch.matmul, one, other), 5, run.device)
    yield {"what": f"product of {size} x {size} matrices", "tflop_s": 2 * size**3 / ms / 1e9}
    several: list[Any] = [torch.randn_like(one) for _ in range(2 if run.dry else 16)]  # more than the card caches
    ms, path = replayed(run, [partial(torch.matmul, matrix, vector) for matrix in several])
    yield {"what": f"{size} x {size} matrix times a vector", "gb_s": len(several) * one.nbytes / ms / 1e6, "path": path}
