"""The link between host and card: its rate, and the time of a decoding step at that rate and at slower ones.

    python benchmarks/pcie.py            on a CUDA device; a minute or two
    python benchmarks/pcie.py --quick    few sizes, a small shape

First the link by itself, from page-locked memory: large copies each way, then scattered chunks of 4 KiB to 1 MiB, and
of as many tokens in 8 and 4 bits, by the kernel of a decoding step and by a gather on the host with one copy. Then
milliseconds per token at the link's real speed and at slower ones, simulated by copying the same bytes 2, 4 and 8
times, each with the planner's prediction: the step without copies plus the time of its copies. --plot draws the second
part. Prints a table, and one line of JSON at the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_link import HEAD_DIM, HEADS, chunks_in, pool
from origin import origin, report
from synthetic import make_model, milliseconds, scripted

from tieredkv.codecs import CODECS, PLAIN
from tieredkv.memory.pagelock import PageLocker, aligned
from tieredkv.ops import torch_ops
from tieredkv.ops.base import Ops
from tieredkv.ops.select import triton
from tieredkv.planning.links import LINKS

ROUNDS = 20


def rate(nbytes: int, ms: float) -> float:
    """Rate in GB/s."""
    return nbytes / ms / 1e6


def contiguous(host: torch.Tensor, device: torch.Tensor) -> list[dict[str, Any]]:
    """Large copies each way."""
    flat = host.view(-1)[: device.numel()].view(device.shape)
    ways: dict[str, Callable[[], object]] = {
        "host to device": lambda: device.copy_(flat, non_blocking=True),
        "device to host": lambda: flat.copy_(device, non_blocking=True),
    }
    return [
        {"kind": name, "bytes": device.nbytes, "gb_s": rate(device.nbytes, milliseconds(copy, ROUNDS, "cuda"))}
        for name, copy in ways.items()
    ]


def scattered(memory: torch.Tensor, bits: int, piece_bytes: int, pieces: int) -> list[dict[str, Any]]:
    """Chunks of about a size from random places to random slots, by the kernel and by the host.

    piece_bytes: in 16 bits; a chunk in fewer has as many tokens.
    """
    source = chunks_in(memory, bits, max(1, piece_bytes // (4 * HEAD_DIM)))
    head, chunk = torch.randint(HEADS, (pieces,)), torch.randint(source.records.shape[1], (pieces,))
    slots, on_card = torch.randperm(pieces, device="cuda"), (head.cuda(), chunk.cuda())
    pages = pool(source, pieces, bits, torch.device("cuda"))
    ways: dict[str, Callable[[], object]] = {
        f"kernel, {bits} bits": lambda: triton().fetch(source, pages, *on_card, slots),
        f"by the host, {bits} bits": lambda: torch_ops.fetch(source, pages, head, chunk, slots),
    }
    if bits == PLAIN:
        packed = pool(source, pieces, 8, torch.device("cuda"))
        ways["kernel, 16 to 8 bits"] = lambda: triton().fetch(source, packed, *on_card, slots)
    piece = source.codec.chunk_bytes
    return [
        {"kind": name, "bits": bits, "piece_bytes": piece, "pieces": pieces, "gb_s": rate(pieces * piece, ms)}
        for name, way in ways.items()
        for ms in [milliseconds(way, ROUNDS, "cuda")]
    ]


def slower(ops: Ops, times: int) -> Ops:
    """Operations that copy every missed chunk `times` times."""

    def gather(*arguments: Any) -> None:
        for _ in range(times):
            ops.gather(*arguments)

    return replace(ops, gather=gather)


def token_time(model: Any, tokens: int, hit_rate: float, times: int, budget: float, bits: int) -> dict[str, Any]:
    """Milliseconds per token if every missed chunk is copied `times` times, and the bytes of one copy."""
    with scripted(model, tokens, slower(triton(), times), hit_rate, budget, ROUNDS + 2, bits=bits) as (cache, steps):
        before = cache.counters.missed_bytes
        ms = milliseconds(lambda: steps(7), ROUNDS, "cuda")
        return {"ms": ms, "bytes": (cache.counters.missed_bytes - before) / (ROUNDS + 2), "path": steps.path}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw milliseconds per token against the link, measured and predicted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for hit_rate in sorted({row["hit_rate"] for row in rows}):
        some = [row for row in rows if row["hit_rate"] == hit_rate]
        line = axes.plot([r["link_gb_s"] for r in some], [r["ms"] for r in some], "o-", label=f"{hit_rate:.0%} hits")
        axes.plot([r["link_gb_s"] for r in some], [r["predicted_ms"] for r in some], ":", color=line[0].get_color())
    for name, speed in LINKS.items():
        axes.axvline(speed, color="0.85", zorder=0)
        axes.text(speed, axes.get_ylim()[1], name, rotation=90, va="top", ha="right", fontsize=7, color="0.5")
    axes.set(xscale="log", xlabel="link, GB/s", ylabel="ms per token (dotted: predicted)")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--hit-rates", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--budget", type=float, default=0.05, help="share of the tokens that a step attends to")
    parser.add_argument("--bits", type=int, choices=sorted(CODECS), default=PLAIN, help="of host chunks, of the steps")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path, help="also write the result here")
    parser.add_argument("--quick", action="store_true", help="few sizes and a small shape")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here, hence no link to measure")
    shape, tokens = ("tiny", 8192) if arguments.quick else (arguments.shape, arguments.tokens)
    memory = aligned((2**28 if arguments.quick else 2**30,), torch.int16)
    memory.zero_()
    locker = PageLocker()
    locker.use(torch.device("cuda"))
    locker.lock(memory)
    if refusal := locker.refusal():
        parser.error(f"host memory could not be page-locked ({refusal}): raise `ulimit -l` or the container's limit")
    link = contiguous(memory, torch.empty(2**27, dtype=torch.int16, device="cuda"))
    sizes = [2**14] if arguments.quick else [2**power for power in range(12, 21, 2)]
    counts = [256] if arguments.quick else [16, 64, 256, 1024]
    gathers = [
        row for size in sizes for count in counts for bits in CODECS for row in scattered(memory, bits, size, count)
    ]
    for row in [*link, *gathers]:
        size = f"{row['pieces']:>5} x {row['piece_bytes'] / 1024:>7.1f} KiB" if "pieces" in row else f"{'':>19}"
        print(f"{row['kind']:<20} {size} {row['gb_s']:7.1f} GB/s", flush=True)
    locker.unlock(memory)
    locker.close()

    rows = []
    with torch.inference_mode():
        model = make_model(shape, "cuda", torch.bfloat16)
        for hit_rate in arguments.hit_rates:
            still = token_time(model, tokens, 1.0, 1, arguments.budget, arguments.bits)["ms"]
            for times in (1, 2, 4, 8):
                measured = token_time(model, tokens, hit_rate, times, arguments.budget, arguments.bits)
                speed = link[0]["gb_s"] / times
                predicted = still + measured["bytes"] / speed / 1e6
                rows.append({"hit_rate": hit_rate, "link_gb_s": speed, "predicted_ms": predicted, **measured})
                print(
                    f"{hit_rate:.0%} hits, {speed:6.1f} GB/s: {measured['ms']:7.2f} ms, predicted {predicted:7.2f}",
                    flush=True,
                )
    if arguments.plot:
        draw(rows, arguments.plot)
    result = {
        "benchmark": "pcie",
        **origin(),
        "shape": shape,
        "tokens": tokens,
        "bits": arguments.bits,
        "link": link,
        "gathers": gathers,
    }
    result["rows"] = rows
    report(result, arguments.out)


if __name__ == "__main__":
    main()
