"""Decoding steps at a real shape (`step_bench.py`), and what they should equal (`step_exactness.py`), by worth."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from gpu_record import Fact, Run
from step_bench import Bench
from step_exactness import exactness, exactness_of, unchanged_by_copies_ahead


def facts(run: Run) -> list[Fact]:
    bench = Bench(run, *(("tiny", 2048) if run.dry else ("7b", 131072)), run.dtype)

    def row(name: str, hit_rate: float | None, seconds: float = 40, **more: Any) -> Fact:
        return Fact(name, seconds, partial(bench.tiered, hit_rate, **more))

    def packed(bits: int, at_cap_2: Fact) -> list[Fact]:
        """The same caps and budgets with host chunks in fewer bits."""
        after = f", {bits} bits"
        return [
            Fact(f"fill{after}", 90, partial(bench.fill, bits)),
            row(f"ranked, 80 % hits{after}", 0.8, bits=bits, **budget),
            row(f"ranked, 80 % hits, copied ahead{after}", 0.8, bits=bits, **predicted),
            row(f"everything fits, cap 4{after}", None, cap=4.0, bits=bits),
            at_cap_2,
            Fact(f"gather from the filled tier{after}", 30, partial(bench.gather, bits)),
            Fact(f"equal to stock{after}", 40, partial(exactness_of, bench, bits)),
        ]

    budget = {"budget_ratio": 0.05, "ahead": False}
    predicted = {"budget_ratio": 0.05, "ahead": True}
    return [
        Fact("model", 60, bench.build),
        Fact("floor", 30, bench.floor),
        Fact("fill", 60, bench.fill),
        row("ranked, 100 % hits", 1.0, **budget),
        row("ranked, 80 % hits", 0.8, **budget),
        row("ranked, 80 % hits, copied ahead", 0.8, **predicted),
        Fact("copied ahead, streams", 40, partial(bench.traced_ahead, 0.8, budget_ratio=0.05)),
        Fact("copied ahead, equal to without", 40, partial(unchanged_by_copies_ahead, bench)),
        row("everything fits, cap 4", None, cap=4.0),
        row("ranked, 95 % hits", 0.95, **budget),
        row("ranked, 80 % hits, evidence", 0.8, evidence=True, **budget),
        row("everything fits, cap 4, evidence", None, cap=4.0, evidence=True),
        Fact("full cache", 30, bench.full),
        Fact("equal to stock", 60, partial(exactness, bench)),
        row("whatever fits, cap 2, 86 % hits", 0.86, cap=2.0, step_overhead=math.inf, ahead=False),
        row("defaults, cap 2, 86 % hits", 0.86, cap=2.0),
        Fact("gather from the filled tier", 30, bench.gather),
        row("ranked, 80 % hits, 48 programs", 0.8, programs=48, **budget),
        row("ranked, 80 % hits, 132 programs", 0.8, programs=132, **budget),
        row("ranked, 80 % hits, eager", 0.8, eager=True, **budget),
        *packed(
            8,
            row("whatever fits, cap 2, 86 % hits, 8 bits", 0.86, cap=2.0, bits=8, step_overhead=math.inf, ahead=False),
        ),
        *packed(4, row("everything fits, cap 2, 4 bits", None, cap=2.0, bits=4)),
        Fact("full cache, static", 40, bench.static),
        Fact("full cache, offloaded", 60, bench.offloaded),
    ]
