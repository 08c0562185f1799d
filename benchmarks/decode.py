"""Decoding on a card: milliseconds per token of transformers' caches and of tieredkv, at real shapes, batch 1.

    python benchmarks/decode.py                  Qwen2.5-VL-7B and 3B, 8k to 256k cached tokens
    python benchmarks/decode.py --quick          a small shape; runs on a CPU too (--device cpu)
    python benchmarks/decode.py --trace FILE     steps with copies ahead beside others, and a Chrome trace of some

For every shape and length, in one run: a cache of one token (the time of the weights, the floor) and transformers'
cache on the card with sdpa, both captured in a graph as tieredkv's steps are, and eager; its static cache compiled (at
one length, as compiling takes minutes), its offloaded cache, and tieredkv without and with speculation, and with copies
ahead for predicted queries, all without evidence. tieredkv's cache is filled once and sealed anew for each row.

Weights, keys and values are random, so the ranking says nothing about how many of the chosen chunks would be in the
pool already, nor a prediction about how many of the others would be chosen. Instead ranks follow a script
(`drift.Drift`) that sets both, which are thus assumed; steps and predictions do all of their work, but the result of
the ranking is not used. Prints a table, including where memory ran out, and one line of JSON at the end. Every row says
how it ran (`path`); a row of tieredkv also its budget, its hit rate, the bits of chunks and what was scripted.
stall_ms: beyond a step whose chunks are all in the pool. foreseen, wasted: chunks copied ahead and selected, and others
copied ahead, relative to those missed without copies ahead; the first layer counts and is not predicted.
streams: as `overlap.overlap`, on a card.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from drift import Drift, shares
from origin import origin, report
from overlap import traced
from stock import graphed, growing_step, stock_step
from synthetic import WARM, filled, make_model, milliseconds, sealed, tiers_for

from tieredkv import POLICIES, TieredCache
from tieredkv.ops.select import ops_for

ROUNDS = 20
ROOM = 2 * ROUNDS + WARM
TOKENS = [8192, 32768, 131072, 262144]
TRACED_TOKENS, TRACED_HITS = 131072, 0.8
SPECULATIVE = replace(POLICIES["hybridkv"], reuse_above=0.8)


@dataclass(frozen=True, slots=True)
class Tiered:
    """tieredkv's rows of one shape and length."""

    cache: TieredCache
    """Filled."""
    drift: Drift
    model: Any
    tokens: int
    arguments: argparse.Namespace

    def row(self, hit_rate: float, speculative: bool = False, ahead: bool = False) -> dict[str, Any]:
        """Time per step and bytes copied. ahead: for predicted queries, as foreseen as `arguments` say."""
        cache, device, budget = self.cache, self.arguments.device, self.arguments.budget
        policy = SPECULATIVE if speculative else POLICIES["hybridkv"]
        tiers = tiers_for(self.model, self.tokens, budget, policy=policy, ahead=ahead)
        script = {"foreseen": self.arguments.foreseen, "wasted": self.arguments.wasted}

        def steps_of(eager: bool = False) -> Any:
            return sealed(cache, self.model, self.drift, tiers, hit_rate, ROOM, eager=eager, **script)

        with steps_of() as steps:
            for _ in range(WARM):
                steps(7)
            before = replace(cache.counters)
            ms = milliseconds(lambda: steps(7), ROUNDS, device)
            after = replace(cache.counters)
            kernels = share_of_kernels(lambda: steps(7), device)
            missed = (after.missed_bytes - before.missed_bytes) / (ROUNDS + 2)
            copied_ahead = (after.prefetched_bytes - before.prefetched_bytes) / (ROUNDS + 2)
            assert cache.decoding is not None
            plan = cache.decoding._phases[0].plan
            row = {
                "ms": ms,
                "path": steps.path,
                "budget": budget,
                "scripted": "ranks",
                "hit_rate": (after.resident - before.resident) / max(1, after.selected - before.selected),
                "evidence": False,
                "ahead": ahead,
                "host_kv_bits": cache.device_tier.host_bits,
                "page_bits": plan.page_bits,
                "chunk_bytes": cache.device_tier.codec(cache.device_tier.host_bits, self.model.dtype).chunk_bytes,
                "chunks_per_head": float(plan.selected.float().mean()),
                "slots_per_head": float(plan.slots.float().mean()),
                "missed_bytes_per_step": missed,
                "ahead_bytes_per_step": copied_ahead,
                "bytes_per_step": missed + copied_ahead,
                "device_bytes": cache.ledger.used_bytes,
                "kernels": kernels,
            }
        if ahead:
            row |= {"scripted": "ranks and predictions", "predicted_layers": len(self.drift.predicted)}
            row |= self.drift.assumed
            if device != "cpu":
                with tempfile.TemporaryDirectory() as folder:
                    row["streams"] = traced(steps_of, self.arguments.trace or Path(folder) / "trace.json")
        return row


def share_of_kernels(step: Callable[[], object], device: str) -> dict[str, float]:
    """Share of a step's time on the card in each of the ten slowest kernels; empty on a CPU."""
    if device == "cpu":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(4):
            step()
        torch.cuda.synchronize()
    events = [(event.key, event.self_device_time_total) for event in profile.key_averages()]
    whole = sum(took for _, took in events) or 1
    best = sorted(events, key=lambda event: -event[1])[:10]
    return {name[:60]: round(took / whole, 4) for name, took in best}


def measure(model: Any, shape: str, tokens: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one shape and length."""
    device, rows = arguments.device, []

    def row(kind: str, work: Callable[[], dict[str, Any]], **more: Any) -> None:
        try:
            result = work()
        except torch.OutOfMemoryError:
            result = {"error": "out of memory"}
        if device != "cpu":
            torch.cuda.empty_cache()
        rows.append({"shape": shape, "tokens": tokens, "kind": kind, **more, **result})
        shown = f"{result['ms']:9.2f} ms" if "ms" in result else result["error"]
        aside = f"{result['bytes_per_step'] / 1e6:8.1f} MB/step" if "bytes_per_step" in result else ""
        hits = f"{result['hit_rate']:.0%}" if "hit_rate" in result else ""
        shown = f"{hits:>13} {shown:>12} {aside:>16} {result.get('path', '')}"
        print(f"{shape:<5} {tokens:>8,} {kind:<18} {shown}", flush=True)

    def captured(length: int) -> dict[str, Any]:
        step, path = graphed(stock_step(model, length), device)
        return {"ms": milliseconds(step, ROUNDS, device), "path": path}

    def eager(step: Callable[[], object], rounds: int = ROUNDS) -> dict[str, Any]:
        return {"ms": milliseconds(step, rounds, device), "path": "eager"}

    row("floor", lambda: captured(1))
    if arguments.trace is None:
        row("floor, eager", lambda: eager(stock_step(model, 1)))
        row("full", lambda: captured(tokens))
        row("full, eager", lambda: eager(growing_step(model, tokens)))
        if tokens in arguments.compile_at:
            row("static, compiled", lambda: {**eager(growing_step(model, tokens, "static")), "path": "compiled"})
        if device != "cpu":  # offloading needs streams
            row("offloaded, eager", lambda: eager(growing_step(model, tokens, "offloaded"), 4))
    drift = Drift(ops_for(torch.device(device)))
    tiers = tiers_for(model, tokens, arguments.budget, ahead=False)
    with filled(model, tokens, drift, ROOM, tiers) as cache:
        ours = Tiered(cache, drift, model, tokens, arguments)
        for target in arguments.hit_rates:
            row("tiered", partial(ours.row, target), target=target)
            if target in arguments.ahead_at:
                row("copied ahead", partial(ours.row, target, ahead=True), target=target)
        if arguments.trace is None:
            row("speculative", partial(ours.row, 0.8, speculative=True), target=0.8)
    compare(rows)
    return rows


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to rows of one shape and length what follows from others."""

    def of(kind: str, name: str, target: float | None = None) -> Any:
        return next((one.get(name) for one in rows if (one["kind"], one.get("target")) == (kind, target)), None)

    floor, full, still = of("floor", "ms"), of("full", "ms"), of("tiered", "ms", 1.0)
    for one in rows:
        if "ms" not in one:
            continue
        one["over_floor"] = None if floor is None else one["ms"] / floor
        one["speedup_over_full"] = None if full is None else full / one["ms"]
        if "bytes_per_step" in one and still is not None:
            one["stall_ms"] = one["ms"] - still
        if one["kind"] == "copied ahead":
            without = of("tiered", "missed_bytes_per_step", one["target"])
            one |= shares(one["missed_bytes_per_step"], one["ahead_bytes_per_step"], without)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["7b", "3b"])
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 8192 32768 131072 262144")
    parser.add_argument("--hit-rates", type=float, nargs="+", default=[1.0, 0.0, 0.5, 0.8, 0.95])
    parser.add_argument(
        "--ahead-at", type=float, nargs="*", default=[0.5, 0.8], help="hit rates with copies ahead, too"
    )
    assumed = "assumed, relative to what a predicted layer would miss; default: as plans assume"
    parser.add_argument("--foreseen", type=float, help=f"copied ahead and not fetched later: {assumed}")
    parser.add_argument("--wasted", type=float, help=f"copied ahead besides: {assumed}")
    parser.add_argument("--compile-at", type=int, nargs="*", default=[131072], help="lengths of the compiled baseline")
    parser.add_argument("--budget", type=float, default=0.05, help="share of the tokens that a step attends to")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="also write the result here")
    parser.add_argument("--quick", action="store_true", help="a small shape and few tokens")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="only steps with and without copies ahead, of the first shape and length (131072), and a Chrome trace "
        'of a few with; compressed if FILE ends with ".gz"',
    )
    arguments = parser.parse_args()
    if arguments.trace is not None and (arguments.device == "cpu" or not torch.cuda.is_available()):
        parser.error("--trace shows the streams of a CUDA device, and a CPU has none")
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: give --device cpu, with --quick, to see that it runs")
    if arguments.quick:
        arguments.shapes, arguments.tokens, arguments.compile_at = ["tiny"], [4096], []
        arguments.hit_rates, arguments.ahead_at = [1.0, 0.0, 0.8], [0.8]
    if arguments.trace is not None:
        arguments.shapes, arguments.tokens = arguments.shapes[:1], (arguments.tokens or [TRACED_TOKENS])[:1]
        arguments.hit_rates, arguments.ahead_at = [1.0, TRACED_HITS], [TRACED_HITS]
    arguments.tokens = arguments.tokens or TOKENS
    dtype, rows = torch.float32 if arguments.device == "cpu" else torch.bfloat16, []
    head = f"{'shape':<5} {'tokens':>8} {'cache':<18} {'hits, assumed':>13} {'per token':>12} {'over the link':>16}"
    print(f"budget {arguments.budget:.0%} of the tokens; ranks are scripted\n{head} path", flush=True)
    with torch.inference_mode():
        for shape in arguments.shapes:
            model = make_model(shape, arguments.device, dtype)
            for tokens in arguments.tokens:
                rows += measure(model, shape, tokens, arguments)
            del model
    result = {"benchmark": "decode", **origin(), "budget": arguments.budget, "rows": rows}
    report(result, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
