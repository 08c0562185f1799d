"""Decoding on a card: milliseconds per token of transformers' caches and of tieredkv, at real shapes, batch 1.

    python benchmarks/decode.py                  Qwen2.5-VL-7B and 3B, 8k to 256k cached tokens
    python benchmarks/decode.py --quick          a small shape; runs on a CPU too (--device cpu)

For every shape and length, in one run: a cache of one token (the time of the weights, the floor) and transformers'
cache on the card with sdpa, both captured in a graph as tieredkv's steps are, and eager; its static cache compiled (at
one length, as compiling takes minutes), its offloaded cache, and tieredkv without and with speculation, all without
evidence. Weights, keys and values are random, so the ranking says nothing about how many of the chosen chunks would be
in the pool already. Instead ranks follow a script (`synthetic.Drift`) that sets the hit rate, which is thus assumed; a
step does all of its work, but the result of the ranking is not used. Prints a table, including where memory ran out,
and one line of JSON at the end. Every row says how it ran (`path`); a row of tieredkv also its budget, its hit rate,
the bits of chunks and what was scripted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from origin import origin, report
from stock import graphed, growing_step, stock_step
from synthetic import make_model, milliseconds, scripted

from tieredkv import POLICIES
from tieredkv.ops.select import ops_for

ROUNDS = 20


def tiered(model: Any, tokens: int, hit_rate: float, speculative: bool, budget: float, device: str) -> dict[str, Any]:
    """A row of tieredkv: time per step and bytes copied."""
    policy = replace(POLICIES["hybridkv"], reuse_above=0.8) if speculative else POLICIES["hybridkv"]
    ops = ops_for(torch.device(device))
    with scripted(model, tokens, ops, hit_rate, budget, 2 * ROUNDS, policy) as (cache, steps):
        before = replace(cache.counters)
        ms = milliseconds(lambda: steps(7), ROUNDS, device)
        after = replace(cache.counters)
        kernels = share_of_kernels(lambda: steps(7), device)
        moved = after.missed_bytes + after.prefetched_bytes - before.missed_bytes - before.prefetched_bytes
        assert cache.decoding is not None
        plan = cache.decoding._phases[0].plan
        return {
            "ms": ms,
            "path": steps.path,
            "budget": budget,
            "scripted": "ranks",
            "hit_rate": (after.resident - before.resident) / max(1, after.selected - before.selected),
            "evidence": False,
            "host_kv_bits": cache.device_tier.host_bits,
            "page_bits": plan.page_bits,
            "chunk_bytes": cache.device_tier.codec(cache.device_tier.host_bits, model.dtype).chunk_bytes,
            "chunks_per_head": float(plan.selected.float().mean()),
            "bytes_per_step": moved / (ROUNDS + 2),
            "device_bytes": cache.ledger.used_bytes,
            "kernels": kernels,
        }


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
    row("floor, eager", lambda: eager(stock_step(model, 1)))
    row("full", lambda: captured(tokens))
    row("full, eager", lambda: eager(growing_step(model, tokens)))
    if tokens in arguments.compile_at:
        row("static, compiled", lambda: {**eager(growing_step(model, tokens, "static")), "path": "compiled"})
    if device != "cpu":  # offloading needs streams
        row("offloaded, eager", lambda: eager(growing_step(model, tokens, "offloaded"), 4))
    for target in arguments.hit_rates:
        row("tiered", partial(tiered, model, tokens, target, False, arguments.budget, device), target=target)
    row("speculative", partial(tiered, model, tokens, 0.8, True, arguments.budget, device), target=0.8)
    best = min((one["ms"] for one in rows if one["kind"] == "tiered" and "ms" in one), default=None)
    floor, full = (next(one.get("ms") for one in rows if one["kind"] == kind) for kind in ("floor", "full"))
    for one in rows:
        if "ms" in one:
            one["over_floor"] = one["ms"] / floor
            one["speedup_over_full"] = None if full is None else full / one["ms"]
        if "bytes_per_step" in one and best is not None:
            one["stall_ms"] = one["ms"] - best
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["7b", "3b"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072, 262144])
    parser.add_argument("--hit-rates", type=float, nargs="+", default=[0.0, 0.5, 0.8, 0.95])
    parser.add_argument("--compile-at", type=int, nargs="*", default=[131072], help="lengths of the compiled baseline")
    parser.add_argument("--budget", type=float, default=0.05, help="share of the tokens that a step attends to")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="also write the result here")
    parser.add_argument("--quick", action="store_true", help="a small shape and few tokens")
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: give --device cpu, with --quick, to see that it runs")
    if arguments.quick:
        arguments.shapes, arguments.tokens, arguments.compile_at = ["tiny"], [4096], []
        arguments.hit_rates = [0.0, 0.8]
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
