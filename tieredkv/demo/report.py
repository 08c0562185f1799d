"""What the demo measured, as a JSON object and as a table."""

from __future__ import annotations

import platform
from importlib.metadata import version
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from tieredkv.demo.answers import ComparedAnswer, right_hops, right_words


def summarize(answers: list[ComparedAnswer], seconds: float) -> dict[str, Any]:
    """The demo's JSON object. Bytes of the full cache and the host tier are those of the longest prompt."""
    stats = [answer.tiered.stats for answer in answers]
    words = sum(len(answer.question.words) for answer in answers)
    chains = [answer for answer in answers if answer.question.kind == "chain"]
    hops = sum(len(answer.question.words) // 2 for answer in chains)
    selected = sum(s.selected_chunks for s in stats)
    resident = sum((s.hit_rate or 0.0) * s.selected_chunks for s in stats)
    return {
        "questions": len(answers),
        "visual_tokens": stats[0].visual_tokens,
        "accuracy_tiered": sum(right_words(a.question, a.tiered.text) for a in answers) / words,
        "accuracy_full": sum(right_words(a.question, a.full) for a in answers) / words,
        "hop_accuracy_tiered": sum(right_hops(a.question, a.tiered.text) for a in chains) / hops if hops else None,
        "hop_accuracy_full": sum(right_hops(a.question, a.full) for a in chains) / hops if hops else None,
        "kv_full_bytes": max(s.kv_full_bytes for s in stats),
        "kv_cap_bytes": stats[0].kv_cap_bytes,
        "kv_device_peak_bytes": max(s.kv_device_peak_bytes for s in stats),
        "kv_host_bytes": max(s.kv_host_bytes for s in stats),
        "static_heads": round(fmean(s.static_heads for s in stats), 2),
        "dynamic_heads": round(fmean(s.dynamic_heads for s in stats), 2),
        "hit_rate": resident / selected if selected else None,
        "moved_bytes": sum(s.moved_bytes for s in stats),
        "ingest_s": round(stats[0].ingest_s, 3),
        "ttft_s": round(fmean(s.ttft_s for s in stats), 4),
        "tpot_ms": round(fmean(s.tpot_ms for s in stats if s.tpot_ms is not None), 3),
        "seconds": round(seconds, 2),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("tieredkv", "torch", "transformers", "av")},
        },
    }


def print_table(console: Console, answers: list[ComparedAnswer], report: dict[str, Any]) -> None:
    """Print the answers as a table, and the report below it."""
    table = Table(title="The same questions through tiered memory and through a full cache")
    for column in ("question", "truth", "tiered", "full cache"):
        table.add_column(column, overflow="fold")
    for answer in answers:
        truth = " ".join(answer.question.words)
        cells = [
            text if text == truth else f"[red]{text or '(nothing)'}[/red]" for text in (answer.tiered.text, answer.full)
        ]
        table.add_row(answer.question.text, truth, *cells)
    console.print(table)
    full, peak, cap = (report[name] for name in ("kv_full_bytes", "kv_device_peak_bytes", "kv_cap_bytes"))
    hops = [report["hop_accuracy_tiered"], report["hop_accuracy_full"]]
    lines = [
        f"words right      tiered {report['accuracy_tiered']:.1%}, full cache {report['accuracy_full']:.1%}",
        f"hops right       tiered {hops[0]:.1%}, full cache {hops[1]:.1%}" if None not in hops else "",
        f"KV on the device {peak:,} bytes at most, of {cap:,} allowed; a full cache takes {full:,} ({peak / full:.1%})",
        f"KV on the host   {report['kv_host_bytes']:,} bytes, {report['visual_tokens']:,} visual tokens",
        f"heads            {report['static_heads']:g} static, {report['dynamic_heads']:g} dynamic, mean per question",
        f"moved            {report['moved_bytes']:,} bytes from host to device in total",
        f"time             ingest {report['ingest_s']:.1f} s, first token {report['ttft_s'] * 1000:.0f} ms, "
        f"then {report['tpot_ms']:.1f} ms per token, {report['seconds']:.0f} s in total",
    ]
    if report["hit_rate"] is not None:
        lines.insert(5, f"hit rate         {report['hit_rate']:.1%} of the selected chunks were already on the device")
    console.print("\n".join(line for line in lines if line))
