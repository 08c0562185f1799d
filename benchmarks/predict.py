"""Predicted milliseconds of a decoding step on cards that nobody here has, before and after two changes.

    python benchmarks/predict.py         an RTX 4090 with the 7B shape and an RTX 3060 with the 3B one, 131,072 tokens
    python benchmarks/predict.py --quick one of them

Before: a step attends to whatever fits, and operations on the cache take as many launches as were counted on an H200
(`results/gpu-h200.jsonl`). Now: copies are limited (`step_overhead`), and launches are those of `step_time.LAUNCHES`.
Everything is computed by `planning.step_time` from assumed rates; nothing runs on a card. The weights are those of the
decoders of Qwen2.5-VL; only full layers of bfloat16. Prints a row for each, and one line of JSON at the end.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from origin import origin, report, rounded
from synthetic import SHAPES

from tieredkv.memory import limits
from tieredkv.planning import forecast, step_time

BEFORE = {"ranked": (2264 - 1139) / 28, "unranked": (1340 - 1139) / 28}
"""Launches a layer on the cache, with evidence, as counted: those of a step, less the model's own."""
CASES = (("RTX 4090", "7b", 4.0), ("RTX 4090", "7b", 2.0), ("RTX 3060", "3b", 3.1), ("RTX 3060", "3b", 2.0))
"""Card, shape, and cap in GiB; 3.1 is what an RTX 3060 has left beside Qwen2.5-VL-3B and its vision tower."""
LINKS = ("pcie4x16", "pcie4x8", "pcie3x16")
PARTS = [f"{part.name}_ms" for part in fields(step_time.StepTime)]


def predicted(card: str, shape: str, cap: float, link: str, tokens: int, now: bool) -> dict[str, Any]:
    """A row of one step."""
    from transformers import Qwen2Config

    config = Qwen2Config(**SHAPES[shape], tie_word_embeddings=shape == "3b", dtype=torch.bfloat16)
    config.max_position_embeddings = 2 * tokens
    launches = step_time.LAUNCHES if now else BEFORE
    with (
        patch.object(limits, "available_host_bytes", lambda: 2**40),
        patch.dict(step_time.LAUNCHES, launches),
    ):
        plan = forecast.plan(
            config, tokens, card=card, link=link, gpu_kv_gb=cap, step_overhead=0.15 if now else math.inf
        )
    step = plan.step
    assert step.time is not None
    return {
        "when": "now" if now else "before",
        "card": card,
        "shape": shape,
        "tokens": tokens,
        "gpu_kv_gb": plan.cap_bytes / 2**30,
        "link": link,
        "limited_by": step.bound,
        "tokens_attended_to": plan.dynamic_tokens,
        "assumed_hit_rate": step.hit_rate,
        "launches": step.launches,
        "device_bytes": plan.step_weight_bytes + plan.step_read_bytes,
        "link_bytes": step.missed_bytes,
        **{f"{name}_ms": ms for name, ms in asdict(step.time).items()},
        "ms": step.time.total,
        "model_ms": step.model_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--out", type=Path, help="also write the result here")
    parser.add_argument("--quick", action="store_true", help="one card and link")
    arguments = parser.parse_args()
    cases, links = (CASES[1:2], LINKS[:1]) if arguments.quick else (CASES, LINKS)
    rows = []
    sum_of = " + ".join(name.removesuffix("_ms") for name in PARTS)
    print(f"| card, shape, cap | link | | limited by | tokens | hits, assumed | launches | link, MB | ms | {sum_of} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for card, shape, cap in cases:
        for link in links:
            for now in (False, True):
                row = predicted(card, shape, cap, link, arguments.tokens, now)
                rows.append(row)
                hits = "" if row["assumed_hit_rate"] is None else f"{row['assumed_hit_rate']:.0%}"
                parts = " + ".join(f"{ms:.1f}" for name, ms in row.items() if name in PARTS)
                print(
                    f"| {card}, {shape}, {row['gpu_kv_gb']:.2g} GiB | {link} | {row['when']} | {row['limited_by']} "
                    f"| {row['tokens_attended_to']:,} | {hits} | {row['launches']:,} | {row['link_bytes'] / 1e6:.0f} "
                    f"| {row['ms']:.1f} | {parts} |",
                    flush=True,
                )
    result = {"benchmark": "predict", **origin(), "assumed": list(step_time.ASSUMED), "rows": rounded(rows)}
    report(result, arguments.out)


if __name__ == "__main__":
    main()
