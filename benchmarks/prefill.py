"""Prefill: tokens per second and peak memory by length, in chunks with the past in host memory, and in one stock call.

    python benchmarks/prefill.py            the 7B shape on a CUDA device, 8k to 128k tokens
    python benchmarks/prefill.py --quick    a small shape; runs on a CPU too (--device cpu)

Text decoders of the real shape with random weights. Stock: one call over the whole prompt, with transformers' cache on
the card. tieredkv: calls of `prefill_chunk` tokens under device caps from the size of the whole cache down to the
smallest that the planner allows. Peak memory is the allocator's, less the weights. Prints a table, and one line of JSON
at the end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from origin import origin, report
from synthetic import make_model

from tieredkv import TierConfig, TieredCache, use_attention
from tieredkv.cache.question import CONTEXT
from tieredkv.environment.versions import cache_argument
from tieredkv.memory.units import GIB, as_gib
from tieredkv.models.kv_shape import model_shape
from tieredkv.planning.admission import smallest_cap_bytes
from tieredkv.planning.sizes import lay_out


def timed(work: Callable[[], float | None], device: str) -> dict[str, Any]:
    """Seconds, less the set-up seconds that `work` returns, and peak bytes; or an "error" if memory ran out."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    weight_bytes = torch.cuda.memory_allocated() if device != "cpu" else 0
    begin = time.perf_counter()
    try:
        apart = work() or 0.0
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    if device == "cpu":
        return {"seconds": time.perf_counter() - begin - apart, "setup_seconds": apart}
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin - apart
    return {"seconds": seconds, "setup_seconds": apart, "peak_bytes": torch.cuda.max_memory_allocated() - weight_bytes}


def stock(model: Any, ids: torch.Tensor) -> None:
    """One call over the whole prompt."""
    from transformers import DynamicCache

    model(ids, **cache_argument(DynamicCache(config=model.config)), logits_to_keep=1)


def tiered(model: Any, ids: torch.Tensor, tiers: TierConfig) -> float:
    """Calls of `prefill_chunk` tokens; returns the seconds of freeing the host tier, which is not part of prefill.

    Page-locking the host tier runs during the prefill, as it does while a video is read.
    """
    with use_attention(model), TieredCache(model.config, tiers, prompt_tokens=ids.shape[1]) as cache:
        cache.expect(CONTEXT)
        for part in ids.split(tiers.prefill_chunk, dim=1):
            model(part, **cache_argument(cache), logits_to_keep=1)
        cache.device_tier.copies.drain()
        done = time.perf_counter()
    return time.perf_counter() - done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--chunk", type=int, default=TierConfig().prefill_chunk, help="tokens per call of tieredkv")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="also write the result here")
    parser.add_argument("--quick", action="store_true", help="a small shape and few tokens")
    arguments = parser.parse_args()
    device = arguments.device
    if device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: give --device cpu, with --quick, to see that it runs")
    shape, lengths, chunk = arguments.shape, arguments.tokens, arguments.chunk
    if arguments.quick:
        shape, lengths, chunk = "tiny", [1024, 2048], 512
    rows = []
    with torch.inference_mode():
        model = make_model(shape, device, torch.float32 if device == "cpu" else torch.bfloat16)
        kv = model_shape(model.config, model.dtype)
        for tokens in lengths:
            ids = torch.randint(100, (1, tokens), device=device)
            base = TierConfig(prefill_chunk=chunk)
            least = smallest_cap_bytes(kv, base, lay_out(base, tokens, 0, 0), 0) / GIB
            full = tokens * kv.token_bytes / GIB
            caps = {"all on the device": 1.1 * full, "half": 0.5 * full, "smallest": least}
            kinds: dict[str, Callable[[], float | None]] = {"stock": lambda ids=ids: stock(model, ids)}
            for name, cap in caps.items():
                tiers = TierConfig(gpu_kv_gb=max(cap, least), prefill_chunk=chunk)
                kinds[name] = lambda ids=ids, tiers=tiers: tiered(model, ids, tiers)
            for work in kinds.values():  # warm up
                timed(work, device)
            for name, work in kinds.items():
                row = timed(work, device)
                row["tokens_per_s"] = tokens / row["seconds"] if "seconds" in row else None
                cap = caps.get(name)
                rows.append({"tokens": tokens, "kind": name, "cap_gib": cap and float(as_gib(cap * GIB)), **row})
                shown = f"{row['tokens_per_s']:10,.0f} tokens/s" if "seconds" in row else row["error"]
                peak = f"{row['peak_bytes'] / GIB:6.2f} GiB" if "peak_bytes" in row else ""
                print(f"{tokens:>8,} {name:<18} {shown} {peak}", flush=True)
    result = {"benchmark": "prefill", **origin(), "shape": shape, "chunk": chunk, "rows": rows}
    report(result, arguments.out)


if __name__ == "__main__":
    main()
