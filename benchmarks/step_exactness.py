"""Logits of decoding steps beside those that they should equal: of transformers' full cache, of an eager step, of a
step without copies ahead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from gpu_record import Values
from step_bench import Bench
from stock import stock_step

from tieredkv.codecs import PLAIN

EAGER_ONLY = ("everything, 8 bits", "ranked, adaptive")
"""Kinds of `exactness` that a run at full size has no time to replay; `answers` does, with a small model."""
STEPS = 5


def exactness(bench: Bench, eager_only: tuple[str, ...] = EAGER_ONLY) -> Iterator[Values]:
    """Logits of a step that attends to everything beside those of transformers' full cache; graph beside eager."""
    from transformers import StaticCache

    stock_logits = stock_step(bench.model, bench.tokens)().float()
    fixed = StaticCache(config=bench.model.config, max_cache_len=bench.tokens + 64)
    by_static = stock_step(bench.model, bench.tokens, fixed)().float()
    # The yardstick: how far apart two ways of transformers' own are, in this dtype.
    yield {"kind": "transformers' static cache", "eager_to_stock": differences(by_static, stock_logits)}
    del fixed
    full = {"gpu_kv_gb": 1.3 * bench.full_gib + 0.2}
    kinds: dict[str, Values] = {
        "everything, 16 bits": {**full, "pack_pages": False},
        "everything, 8 bits": {"gpu_kv_gb": 4 * bench.full_gib / 7},
        "ranked": {**full, "budget_ratio": 0.05},
        "ranked, adaptive": {**full, "budget_ratio": 0.05, "adaptive": True},
    }
    for kind, tiers in kinds.items():
        yield _beside(bench, stock_logits, kind, kind not in eager_only, **tiers)


def exactness_of(bench: Bench, bits: int) -> Values:
    """Logits of a step that attends to everything in so many bits beside those of transformers' full cache."""
    stock_logits = stock_step(bench.model, bench.tokens)().float()
    kind = f"everything, host chunks in {bits} bits"
    return _beside(bench, stock_logits, kind, True, bits=bits, gpu_kv_gb=1.3 * bench.full_gib + 0.2)


def _beside(bench: Bench, stock_logits: torch.Tensor, kind: str, replayed: bool, **tiers: Any) -> Values:
    rows = {}
    for eager in (True, False) if replayed else (True,):
        with bench.sealed(None, eager=eager, warm=0, **tiers) as (steps, _):
            rows[eager] = torch.stack([steps(7).float().flatten().clone() for _ in range(STEPS)])
            path = steps.path
    row: Values = {"kind": kind, "eager_to_stock": differences(rows[True][0], stock_logits), "path": path}
    if replayed:
        row["graph_to_eager"] = differences(rows[False], rows[True])
    return row


def unchanged_by_copies_ahead(bench: Bench) -> Values:
    """Whether logits of steps with copies ahead are those without, to the bit; by the real ranks and predictions."""
    logits, row = {}, Values()
    for ahead in (False, True):
        tiers = {"gpu_kv_gb": 1.3 * bench.full_gib + 0.2, "budget_ratio": 0.05, "ahead": ahead}
        with bench.sealed(None, warm=0, **tiers) as (steps, _):
            logits[ahead] = torch.stack([steps(7).float().flatten().clone() for _ in range(STEPS)])
            row["path"] = steps.path
            row["ahead_bytes_per_step"] = bench.cache(PLAIN).counters.prefetched_bytes / STEPS
    same = torch.equal(logits[False], logits[True])
    return {"same": same, "ahead_to_without": differences(logits[True], logits[False]), **row}


def differences(got: torch.Tensor, want: torch.Tensor) -> Values:
    """How far logits `(..., vocabulary)` are apart."""
    off = (got - want).abs()
    return {
        "largest": float(off.max()),
        "mean": float(off.mean()),
        "std_of_logits": float(want.std()),
        "same_tokens": bool((got.argmax(-1) == want.argmax(-1)).all()),
        "finite": bool(got.isfinite().all()),
    }
