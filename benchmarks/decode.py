"""Decoding on a card: milliseconds per token of transformers' caches and of tieredkv, at real shapes, batch 1.

    python benchmarks/decode.py                  Qwen2.5-VL-7B and 3B, 8k to 256k cached tokens
    python benchmarks/decode.py --quick          a small shape; runs on a CPU too (--device cpu)

For every shape and length, in one run: an empty cache (the time of the weights, the floor), transformers' cache on the
card with sdpa, its static cache compiled (at one length, as compiling takes minutes), its offloaded cache, and tieredkv
without and with speculation. Weights, keys and values are random, so the ranking says nothing about how many of the
chosen chunks would be in the pool already. Instead ranks follow a script (`synthetic.Drift`) that sets the hit rate; a
step does all of its work, but the result of the ranking is not used. Prints a table, including where memory ran out,
and one line of JSON at the end.
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
from synthetic import keys_and_values, make_model, milliseconds, scripted

from tieredkv import POLICIES
from tieredkv.environment.versions import cache_argument
from tieredkv.ops.select import ops_for

ROUNDS = 20


def stock(model: Any, tokens: int, kind: str, device: str) -> Callable[[], object]:
    """A decoding step of transformers' cache: "full", "offloaded", or "static" (compiled)."""
    from transformers import DynamicCache, StaticCache

    cache: Any
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=tokens + 64)
    else:
        cache = DynamicCache(config=model.config, offloading=kind == "offloaded")
    for index in range(model.config.num_hidden_layers if tokens else 0):
        keys, values = keys_and_values(model, tokens, index)
        cache.update(keys[None], values[None], index)
    forward = torch.compile(model, mode="reduce-overhead") if kind == "static" else model
    token, place = torch.full((1, 1), 7, device=device), torch.full((1, 1), tokens, device=device)

    def step() -> None:
        forward(token, **cache_argument(cache), position_ids=place)
        place.add_(1)

    return step


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
        return {
            "ms": ms,
            "path": steps.path,
            "hit_rate": (after.resident - before.resident) / max(1, after.selected - before.selected),
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
        aside = f"{result['bytes_per_step'] / 1e6:8.1f} MB/step {result['path']}" if "path" in result else ""
        print(f"{shape} {tokens:>8,} {kind:<12} {more.get('target', ''):>5} {shown} {aside}", flush=True)

    def timed(kind: str, length: int) -> dict[str, Any]:
        return {"ms": milliseconds(stock(model, length, kind, device), ROUNDS if kind != "offloaded" else 4, device)}

    row("floor", lambda: timed("full", 0))
    row("full", lambda: timed("full", tokens))
    if tokens in arguments.compile_at:
        row("static", lambda: timed("static", tokens))
    if device != "cpu":  # offloading needs streams
        row("offloaded", lambda: timed("offloaded", tokens))
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
