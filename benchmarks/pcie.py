"""The link between host and card: its rate, and the time of a decoding step at that rate and at slower ones.

    python benchmarks/pcie.py            on a CUDA device; a minute or two
    python benchmarks/pcie.py --quick    few sizes, a small shape

First the link by itself, from page-locked memory: large copies each way, then scattered chunks of the shipped 8 tokens
(4 KiB in 16 bits, 2 in 8) up to 2,048, by the kernel of a decoding step, 16 launches in one captured graph, and by a
gather on the host with one copy. Then milliseconds per token at the link's real speed and at slower ones, simulated by
copying the same bytes 2, 4 and 8 times, each with the planner's prediction: the step without copies, measured, plus the
time of its copies (`planning.step_time`). Ranks follow a script, so hit rates are assumed. --plot draws the second
part. Prints a table, and one line of JSON at the end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_link import HEADS, MISSES, chunks_in, gather_ms, pool
from gpu_record import Run
from origin import origin, report
from synthetic import make_model, milliseconds, scripted

from tieredkv import TierConfig
from tieredkv.codecs import CODECS, PLAIN
from tieredkv.memory.pagelock import PageLocker, aligned
from tieredkv.ops import torch_ops
from tieredkv.ops.base import Ops
from tieredkv.ops.select import triton
from tieredkv.planning.links import LINKS
from tieredkv.planning.rates import Rates, copy_ms

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


def scattered(run: Run, memory: torch.Tensor, tokens: int, bits: int, pieces: int) -> list[dict[str, Any]]:
    """Chunks of so many tokens from random places to random slots, by the kernel and by the host."""
    source, device = chunks_in(memory, bits, tokens), torch.device(run.device)
    piece, rows = source.codec.chunk_bytes, []

    def row(kind: str, page_bits: int, ms: float, path: str) -> None:
        told = {"kind": kind, "chunk_tokens": tokens, "host_kv_bits": bits, "page_bits": page_bits, "path": path}
        rows.append({**told, "piece_bytes": piece, "pieces": pieces, "gb_s": rate(pieces * piece, ms)})

    for page_bits in (bits, 8) if bits == PLAIN else (bits,):
        row("kernel", page_bits, *gather_ms(run, [source], pieces, page_bits))
    head, chunk = torch.randint(HEADS, (pieces,)), torch.randint(source.records.shape[1], (pieces,))
    pages, slots = pool(source, pieces, bits, device), torch.randperm(pieces, device=device)
    ms = milliseconds(lambda: torch_ops.fetch(source, pages, head, chunk, slots), ROUNDS, run.device)
    row("by the host", bits, ms, "eager")
    return rows


def slower(ops: Ops, times: int) -> Ops:
    """Operations that copy every missed chunk `times` times."""

    def gather(*arguments: Any) -> None:
        for _ in range(times):
            ops.gather(*arguments)

    return replace(ops, gather=gather)


def token_time(model: Any, tokens: int, hit_rate: float, times: int, budget: float, bits: int) -> dict[str, Any]:
    """Milliseconds per token if every missed chunk is copied `times` times, and the bytes of one copy."""
    with scripted(model, tokens, slower(triton(), times), hit_rate, budget, ROUNDS + 2, bits=bits) as (cache, steps):
        before = replace(cache.counters)
        ms = milliseconds(lambda: steps(7), ROUNDS, "cuda")
        after = cache.counters
        return {
            "ms": ms,
            "bytes": (after.missed_bytes - before.missed_bytes) / (ROUNDS + 2),
            "path": steps.path,
            "budget": budget,
            "scripted": "ranks",
            "hit_rate": (after.resident - before.resident) / max(1, after.selected - before.selected),
            "host_kv_bits": bits,
        }


def predicted_ms(still: float, nbytes: float, layers: int, link_gb_s: float) -> float:
    """A step that takes `still` without copies, and waits in every layer for its share of the bytes."""
    return still + layers * copy_ms(nbytes / layers, Rates.of(card_gb_s=1.0, link_gb_s=link_gb_s))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw milliseconds per token against the link, measured and predicted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for hit_rate in sorted({row["scripted_hit_rate"] for row in rows}):
        some = [row for row in rows if row["scripted_hit_rate"] == hit_rate]
        line = axes.plot(
            [r["link_gb_s"] for r in some], [r["ms"] for r in some], "o-", label=f"{hit_rate:.0%} hits, assumed"
        )
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
    parser.add_argument("--bits", type=int, choices=sorted(CODECS), default=8, help="of host chunks, of the steps")
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
    run, shipped = Run(Path(), dry=False, started=time.time()), TierConfig().chunk_tokens
    sizes = [shipped] if arguments.quick else [shipped * 4**power for power in range(5)]
    counts = [256] if arguments.quick else [64, *sorted(MISSES), 1024]
    cases = [(size, bits, count) for size in sizes for bits in CODECS for count in counts]
    gathers = [row for case in cases for row in scattered(run, memory, *case)]
    for row in [*link, *gathers]:
        size = f"{row['pieces']:>5} x {row['piece_bytes'] / 1024:>7.1f} KiB" if "pieces" in row else f"{'':>19}"
        bits = f"{row['host_kv_bits']} to {row['page_bits']} bits" if "pieces" in row else ""
        print(f"{row['kind']:<16} {bits:>14} {size} {row['gb_s']:7.1f} GB/s {row.get('path', '')}", flush=True)
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
                predicted = predicted_ms(still, measured["bytes"], model.config.num_hidden_layers, speed)
                told = {"scripted_hit_rate": hit_rate, "link_gb_s": speed, "predicted_ms": predicted}
                rows.append({**told, **measured})
                print(
                    f"{hit_rate:.0%} hits (assumed), {arguments.budget:.0%} of the tokens, {speed:6.1f} GB/s: "
                    f"{measured['ms']:7.2f} ms, predicted {predicted:7.2f}",
                    flush=True,
                )
    if arguments.plot:
        draw(rows, arguments.plot)
    result = {
        "benchmark": "pcie",
        **origin(),
        "shape": shape,
        "tokens": tokens,
        "budget": arguments.budget,
        "host_kv_bits": arguments.bits,
        "link": link,
        "gathers": gathers,
    }
    result["rows"] = rows
    report(result, arguments.out)


if __name__ == "__main__":
    main()
