"""Records of `quality.py` as rows with intervals, as a table and as a plot."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

VIDEO_MODELS = ("tiny", "tiny-hybrid")
"""Models that are asked about videos."""
FULL = "full"
"""Label of the full cache, with which every row is compared."""
AS_MADE_LABEL = "hybridkv, 16-bit pages"


def aggregate(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per model, task, tokens, chunk size, label and budget; for chains also one per hop."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        budget = record["fields"].get("budget_ratio", 1.0)
        cells[
            (*(record[name] for name in ("model", "task", "tokens", "chunk_tokens")), record["label"], budget)
        ].append(record)
    rows = []
    for (model, task, tokens, chunk, label, budget), cell in cells.items():
        whole = {tuple(r["question"]): r for r in cells[(model, task, tokens, chunk, FULL, 1.0)]}
        full = [whole[tuple(r["question"])] for r in cell]
        shared = {
            "model": model,
            "tokens": tokens,
            "budget": budget,
            "policy": label,
            "chunk_tokens": chunk,
            "n": len(cell),
            "ppl_ratio": math.exp(
                (sum(r["nll"] for r in cell) - sum(r["nll"] for r in full)) / sum(r["scored"] for r in cell)
            ),
            "kv_ratio": _mean(r["held"] / r["full"] for r in cell),
            "mass_recall": _mean(r["recall"] for r in cell if r["recall"] is not None),
            "kl": _mean(one for r in cell for one in r["kl"] or []),
            "same": _mean(one for r in cell for one in r["same"] or []),
            "bytes_per_step": sum(r["missed"] for r in cell) / max(1, sum(r["decoded"] for r in cell)),
        }
        rows.append({**shared, "task": task, **_accuracy(cell, full, lambda r: _mean(_steps(r).values()))})
        if model in VIDEO_MODELS and task != "lookup":
            for hop in sorted(_steps(cell[0])):
                at_hop = _accuracy(cell, full, lambda r, hop=hop: _steps(r)[hop])
                rows.append({**shared, "task": f"{task}, hop {hop}", **at_hop})
    return rows


def _steps(record: dict[str, Any]) -> dict[int, bool]:
    """Whether each step is right."""
    right = record["so_far"] if record["model"] in VIDEO_MODELS else record["right"]
    steps: dict[int, bool] = {}
    for step, one in zip(record["steps"], right, strict=True):
        steps[step] = bool(one) and steps.get(step, True)
    if record["model"] in VIDEO_MODELS and len(steps) > 1:  # the prefill gives the first hop
        del steps[1]
    return steps


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None


def _accuracy(records: list[dict[str, Any]], full: list[dict[str, Any]], score: Callable[[Any], Any]) -> dict[str, Any]:
    """Mean accuracy, its interval, the full cache's on the same questions, and the interval of the difference."""
    import numpy as np

    got, want = np.array([score(r) for r in records], float), np.array([score(r) for r in full], float)
    picks = np.random.default_rng(0).integers(0, len(got), (2000, len(got)))
    low, high = np.quantile(got[picks].mean(1), (0.025, 0.975))
    below, above = np.quantile((got - want)[picks].mean(1), (0.025, 0.975))
    return {
        "accuracy": got.mean(),
        "low": low,
        "high": high,
        "accuracy_full": want.mean(),
        "difference_low": below,
        "difference_high": above,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    head = f"{'model':8} {'tokens':>6} {'task':28} {'budget':>6} {'policy':28} {'n':>4} {'acc':>6} {'95 %':>13} "
    print(head + f"{'full':>6} {'ppl x':>7} {'kv':>6} {'recall':>6} {'KB/step':>8}")
    for row in sorted(rows, key=lambda r: (r["model"], r["tokens"], r["task"], -r["budget"], r["policy"])):
        recall = "-" if row["mass_recall"] is None else f"{row['mass_recall']:.1%}"
        print(
            f"{row['model']:8} {row['tokens']:6} {row['task']:28} {row['budget']:6.1%} {row['policy']:28} {row['n']:4} "
            f"{row['accuracy']:6.1%} {row['low']:5.1%}..{row['high']:6.1%} {row['accuracy_full']:6.1%} "
            f"{row['ppl_ratio']:7.3f} {row['kv_ratio']:6.1%} {recall:>6} {row['bytes_per_step'] / 1024:8.1f}"
        )


COLOURS = {
    "hybridkv": "#d62728",
    AS_MADE_LABEL: "#ff7f0e",
    "paper": "#ff9896",
    "quest": "#1f77b4",
    "arkvale": "#17becf",
    "snapkv": "#2ca02c",
    "mixkv": "#98df8a",
    "lookm": "#8c564b",
    "streaming": "#7f7f7f",
}
DRAWN = {
    **dict.fromkeys(VIDEO_MODELS, ("chain, hop 6", "second, hop 6", "second, not sealed anew, hop 6")),
    "smollm2": ("chain", "lookup", "copy", "needle"),
}
"""Tasks with a panel for each length."""


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against the memory that each policy used, with a panel for each task and length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = sorted({(r["task"], r["tokens"]) for r in rows if r["task"] in DRAWN[r["model"]]})
    columns = min(2 if len(panels) == 4 else 3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, (task, tokens) in zip(grid, panels, strict=False):
        shown = [r for r in rows if (r["task"], r["tokens"]) == (task, tokens)]
        axes.axhline(100 * shown[0]["accuracy_full"], color="black", linewidth=1, linestyle=":", label="full cache")
        for policy, colour in COLOURS.items():
            points = sorted((r for r in shown if r["policy"] == policy), key=lambda r: r["budget"])
            x = [100 * r["kv_ratio"] for r in points]
            y = [100 * r["accuracy"] for r in points]
            low = [100 * (r["accuracy"] - r["low"]) for r in points]
            high = [100 * (r["high"] - r["accuracy"]) for r in points]
            axes.errorbar(x, y, (low, high), color=colour, marker="o", markersize=3, linewidth=1.3, label=policy)
        axes.set(title=f"{task}, {tokens:,} tokens", xscale="log", ylim=(-3, 103))
        axes.set_xticks([5, 10, 20, 50], ["5", "10", "20", "50"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.supxlabel("key/value memory on the device, % of a full cache")
    figure.supylabel("right, %")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)
