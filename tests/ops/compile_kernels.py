"""Compile every kernel for a card that need not be present: python tests/ops/compile_kernels.py 89 [--common]

With --common only for the shapes that most people run (bfloat16, heads of 128 dimensions), which hardly spill.
Calls the wrappers as usual, with tensors on the CPU and a driver that reports its target and launches nothing. Prints a
line per kernel: its name, shared memory per block and stack per thread. Exit code 1 if one exceeds a limit.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tieredkv.codecs import CODECS, codec_for
from tieredkv.codecs.base import Codec, Fit
from tieredkv.ops.base import Listing, Pages
from tieredkv.ops.triton import adapt, attend, choose, copy, mass, project, rank, walsh
from tieredkv.policy.digests.sketch import Basis
from tieredkv.policy.digests.walsh import Walsh

SHARED = {75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}
"""Bytes of shared memory that a block may have, by compute capability."""
MOST_STACK, MOST_COMMON_STACK = 256, 16
"""Bytes of stack per thread, where registers spill: of rare shapes, as float32 and very wide heads, and of common ones,
of which only `_place` spills two to four registers."""


class Driver:
    """The part of a driver that the compiler calls."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def stack(cubin: bytes) -> int:
    """Bytes of stack per thread, as the vendor's tool reads them; 0 if Triton does not include it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return 0
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.findall(r"STACK:(\d+)", said.stdout + said.stderr)
    return max(map(int, found), default=0)


@dataclass
class Chunks:
    """A `Source` of four heads."""

    codec: Codec
    records: torch.Tensor


def pages_of(bits: int, c: int, d: int, dtype: torch.dtype) -> Pages:
    """Forty pages that four heads share."""
    codec = codec_for(bits, c, d, dtype)
    fit = Fit(torch.zeros(4, 2, d), torch.zeros(4, 2, d)) if codec.needs_fit else None
    return Pages(codec, torch.zeros(40, codec.chunk_bytes, dtype=torch.uint8), fit)


def call_all(common: bool) -> None:
    """Every wrapper, with the shapes and types of real models; common: only with the first of each kind."""
    first = slice(0, 1 if common else None)
    for dtype, group, c, d in (
        (torch.bfloat16, 7, 8, 128), (torch.float16, 7, 8, 80), (torch.bfloat16, 1, 32, 64), (torch.bfloat16, 8, 8, 96),
        (torch.bfloat16, 16, 8, 256), (torch.bfloat16, 16, 8, 512), (torch.float32, 7, 8, 128),
        (torch.float32, 32, 8, 64), (torch.float32, 2, 8, 16),
    )[first]:  # fmt: skip
        query, rows = torch.zeros(4 * group, 1, d, dtype=dtype), torch.zeros(4, d, dtype=dtype)
        table, page_lse = torch.zeros(4, 37, dtype=torch.int32), torch.zeros(4 * group, 37)
        for bits in CODECS:
            pages = pages_of(bits, c, d, dtype)
            for written in (None, page_lse):
                attend.paged_attention(query, pages, table, table, 0.1, page_lse=written, dtype=dtype)
            copy.append(rows, rows, pages, table, table, torch.zeros(4, 2, dtype=torch.int32))
    for group, c, r, bits in ((7, 8, 64, 4), (2, 8, 8, 4), (7, 8, 64, 8), (7, 128, 64, 4), (16, 32, 48, 4))[first]:
        basis = Basis(torch.zeros(4, 2 * r, r), torch.zeros(4, 2 * r, r), torch.zeros(4, 1, 2 * r))
        queries = torch.zeros(6, group, 2 * r, dtype=torch.bfloat16)
        project.project(queries, torch.arange(4), 0.1, basis.up, basis.centre)
        rank.pack_sketches(torch.zeros(4, 9, 2, c, 2 * r, dtype=torch.bfloat16)[:, :, 0], bits, basis)
        rank.sketch_logits(torch.zeros(4, group, r), torch.zeros(4, 99, c * r * bits // 8, dtype=torch.uint8), bits, c)
    for group, c, d, bits in ((7, 8, 128, 4), (2, 8, 16, 4), (7, 16, 128, 8), (16, 64, 256, 4))[first]:
        digest = Walsh(d, c, bits)
        numbers = 4 * (digest.mean_bytes + digest.other_bytes)
        packed = torch.zeros(4, 99, digest.chunk_bytes, dtype=torch.uint8)
        numbers_of = torch.zeros(4, numbers, dtype=torch.int16), torch.zeros(4, numbers, dtype=torch.uint8)
        up = torch.zeros(4, d, digest.directions, dtype=torch.float16)
        queries = torch.zeros(6, group, d, dtype=torch.float16)
        project.project(queries, torch.arange(4), 0.1, up, torch.zeros(4, 1, d), *numbers_of)
        walsh.walsh_logits(torch.zeros(4, group, numbers), packed, digest)
    chosen = torch.zeros(4, 4001, dtype=torch.bool)
    for rule in rank.GROUPS:
        for parts in (None, torch.zeros(4, 7, 251)):
            rank.chunk_ranks(torch.zeros(4, 7, 4001), chosen, rule, 1.0, parts)
    heads, few, step = torch.arange(4), torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
    of_queries, slot_of = torch.zeros(4, 7), torch.zeros(4, 4002, dtype=torch.int32)
    for constant in (None, of_queries):
        mass.log_mass_without(torch.zeros(4, 7, 4001), chosen, constant)
    mass.record_unseen(of_queries, of_queries, heads, torch.zeros(4), torch.zeros(4, dtype=torch.float64))
    lengths = torch.zeros(4, 400, dtype=torch.int32)
    adapt.adapt(few, torch.zeros(4), few, few, few, lengths, heads, 3, 390, 8)
    mass.add_mass(torch.zeros(4001), torch.zeros(28, 400), of_queries, chosen, slot_of, heads, 3)
    for chunks, slots in ((40001, 20000), (16001, 8000), (4001, 300)):  # rows above, at and below the largest block
        chosen, slot_of = torch.zeros(4, chunks, dtype=torch.bool), torch.zeros(4, chunks + 1, dtype=torch.int32)
        tables = [torch.zeros(4, slots, dtype=torch.int32) for _ in range(3)]
        table, order = (torch.zeros(4, slots + 200, dtype=torch.int32), torch.zeros(4, chunks, dtype=torch.int32))
        for listing in (Listing(table, heads, 3, order), None):
            missed, misses = choose.choose(torch.zeros(4, chunks), few, slot_of, 200, chosen, listing and listing.order)
            victims = choose.place(chosen, chosen, missed, misses, *tables, step, few, listing)
    for c, d, dtype in (
        (8, 128, torch.bfloat16), (8, 80, torch.float16), (32, 128, torch.bfloat16), (128, 128, torch.bfloat16),
        (8, 256, torch.bfloat16), (8, 64, torch.float32),
    )[first]:  # fmt: skip
        for bits, page_bits in ((16, 8), *((bits, bits) for bits in CODECS)):
            codec, pages = codec_for(bits, c, d, dtype), pages_of(page_bits, c, d, dtype)
            source = Chunks(codec, torch.zeros(4, 60, codec.chunk_bytes, dtype=torch.uint8))
            copy.gather(source, pages, heads, missed, victims, misses, *tables[:2], slot_of, 1)
            copy.fetch(source, pages, heads, heads, heads)
            copy.keep(source, pages, 1, torch.arange(20), torch.arange(9))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int, nargs="?", default=89, choices=SHARED)
    parser.add_argument("--common", action="store_true")
    arguments = parser.parse_args()
    capability, most_stack = arguments.capability, MOST_COMMON_STACK if arguments.common else MOST_STACK
    triton.runtime.driver.set_active(Driver(capability))
    launch, failed = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        shared, stacked = kernel.metadata.shared, stack(kernel.asm["cubin"])
        fits = shared <= SHARED[capability] and stacked <= most_stack
        print(f"{self.__name__:<16} shared {shared:>7,} stack {stacked:>5,}{'' if fits else '  TOO MUCH'}", flush=True)
        if not fits:
            failed.append(self.__name__)
        return kernel

    JITFunction.run = compile_only
    call_all(arguments.common)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
