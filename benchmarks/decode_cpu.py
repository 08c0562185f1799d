"""Decoding on a CPU: tieredkv attending to a tenth of the tokens, compared with transformers' full caches.

    python benchmarks/decode_cpu.py            8k to 64k tokens, layers of Qwen2.5-7B's shape; minutes
    python benchmarks/decode_cpu.py --quick    a small shape, as a check that it runs
    python benchmarks/decode_cpu.py --tokens 32768 --busy 0 1 3    also while other processes keep cores busy
    python benchmarks/decode_cpu.py --demo     the bundled model's shape at the demo's length and cap
    python benchmarks/decode_cpu.py --ops torch    without what Numba compiles

A few layers of the real shape, float32, batch 1, with a small vocabulary. Baselines are transformers' own caches with
sdpa: the dynamic cache, which is copied to grow at each step, and the static one, which is preallocated; `ratio` is
relative to the faster, `ratio_dynamic` to the default of `generate`. Steps are timed in turn, each kind once per round,
and the median is taken. Prints a table, and one line of JSON at the end.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from origin import origin, report, rounded  # before torch: it sets how torch's threads wait

# isort: split
import torch
from synthetic import fill, keys_and_values, make_model

from tieredkv import TierConfig, TieredCache, use_attention
from tieredkv.environment.versions import cache_argument
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import model_shape
from tieredkv.ops.base import Ops
from tieredkv.ops.select import TORCH, numba, ops_for

RESULT = Path(__file__).parent / "results" / "decode-cpu.json"


def stock(model: Any, tokens: int, kind: str, steps: int) -> Callable[[int], None]:
    """A decoding step of transformers' cache of `tokens` tokens."""
    from transformers import DynamicCache, StaticCache

    cache = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=tokens + steps)
    )
    for index in range(model.config.num_hidden_layers if tokens else 0):
        keys, values = keys_and_values(model, tokens, index)
        cache.update(keys[None], values[None], index)

    def step(count: int) -> None:
        model(torch.tensor([[7]]), **cache_argument(cache), position_ids=torch.tensor([[tokens + count]]))

    return step


def tiered(
    model: Any, tokens: int, tiers: TierConfig, steps: int, ops: Ops | None = None
) -> tuple[Callable[[int], None], TieredCache]:
    """A decoding step of tieredkv, and its cache. ops: None: the fastest installed."""
    cache = TieredCache(model.config, tiers, max_new_tokens=steps, ops=ops)
    fill(cache, model, tokens)
    cache.seal()

    def step(count: int) -> None:
        with use_attention(model):
            token, place = torch.tensor([[7 + count % 5]]), torch.tensor([[tokens + count]])
            model(token, **cache_argument(cache), position_ids=place)

    return step, cache


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """`count` other processes that compute without a pause, at the same priority, until the block ends."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(
    model: Any, tokens: int, budget: float, rounds: int, busy: int, cap_share: float, ops: Ops | None
) -> dict[str, Any]:
    """A row: milliseconds per step of each kind next to `busy` busy processes, and tieredkv's memory and copies."""
    steps = rounds + 2
    full_bytes = tokens * model_shape(model.config, model.dtype).token_bytes
    if cap_share < 1:
        tiers = TierConfig(gpu_kv_gb=cap_share * full_bytes / GIB)
    else:
        tiers = TierConfig(gpu_kv_gb=max(0.5, full_bytes / GIB), budget_ratio=budget)
    ours, cache = tiered(model, tokens, tiers, steps, ops)
    kinds = {
        "floor": stock(model, 0, "dynamic", steps),
        "dynamic": stock(model, tokens, "dynamic", steps),
        "static": stock(model, tokens, "static", steps),
        "tiered": ours,
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    with torch.inference_mode(), busy_processes(busy):
        for count in range(steps):
            for name, step in kinds.items():
                begin = time.perf_counter()
                step(count)
                times[name].append(1000 * (time.perf_counter() - begin))
    median = {name: statistics.median(each[2:]) for name, each in times.items()}
    counters, device_bytes = cache.counters, cache.ledger.used_bytes
    full = min(median["dynamic"], median["static"])
    cache.close()
    return {
        "tokens": tokens,
        "busy": busy,
        "floor_ms": median["floor"],
        "dynamic_ms": median["dynamic"],
        "static_ms": median["static"],
        "full_ms": full,
        "tiered_ms": median["tiered"],
        "of_floor": median["tiered"] / median["floor"],
        "of_full": median["tiered"] / full,
        "ratio": full / median["tiered"],
        "ratio_static": median["static"] / median["tiered"],
        "ratio_dynamic": median["dynamic"] / median["tiered"],
        "hit_rate": counters.hit_rate,
        "copied_bytes_per_step": counters.missed_bytes / steps,
        "kv_ratio": device_bytes / full_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument(
        "--busy", type=int, nargs="+", default=[0], help="numbers of other processes that keep a core busy"
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--demo", action="store_true", help="the bundled model's shape, 4,080 tokens, a cap of a tenth")
    parser.add_argument("--ops", choices=["torch", "numba"], help="operations; the fastest installed by default")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    parser.add_argument("--out", type=Path, help=f"also write the result here, as {RESULT} was")
    parser.add_argument("--quick", action="store_true", help="a small shape and few tokens")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    ops = {None: lambda: None, "torch": lambda: TORCH, "numba": numba}[arguments.ops]()
    if arguments.demo:
        lengths, shape, cap_share, rounds = [4080], "demo", 0.1, 10 * arguments.rounds
        model = make_model(shape, "cpu", torch.float32)
    else:
        lengths = [1024, 2048] if arguments.quick else arguments.tokens
        shape, cap_share, rounds = "tiny" if arguments.quick else "7b", 1.0, 2 if arguments.quick else arguments.rounds
        model = make_model(shape, "cpu", torch.float32, num_hidden_layers=arguments.layers, vocab_size=256)
    heads = " ".join(f"{name:>8}" for name in ("floor", "dynamic", "static", "tiered"))
    print(f"{'tokens':>7} {'busy':>4} {heads} {'ratio':>6} {'dynamic':>8} {'floor x':>8} {'hits':>6} {'memory':>7}")
    rows = []
    for tokens, busy in itertools.product(lengths, arguments.busy):
        row = measure(model, tokens, arguments.budget, rounds, busy, cap_share, ops)
        rows.append(row)
        print(
            f"{tokens:>7,} {busy:>4} {row['floor_ms']:>8.1f} {row['dynamic_ms']:>8.1f} {row['static_ms']:>8.1f} "
            f"{row['tiered_ms']:>8.1f} {row['ratio']:>6.2f} {row['ratio_dynamic']:>8.2f} "
            f"{row['of_floor']:>8.2f} {row['hit_rate']:>6.1%} {row['kv_ratio']:>7.1%}",
            flush=True,
        )
    result = {
        "benchmark": "decode_cpu",
        **origin("numba"),
        "shape": shape,
        "layers": model.config.num_hidden_layers,
        "ops": (ops or ops_for(torch.device("cpu"))).name,
        "budget": arguments.budget,
        "threads": torch.get_num_threads(),
        "rows": rounded(rows),
    }
    report(result, arguments.out)


if __name__ == "__main__":
    main()
