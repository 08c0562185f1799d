"""Measurements of an answer, for people."""

from __future__ import annotations

import sys

from tieredkv.memory.units import size_text as size
from tieredkv.progress import spans_text, timecode
from tieredkv.session.results import Generation, Stats


def say_times(answer: Generation) -> None:
    """Report on stderr the times that an answer names, if it was asked for them."""
    if answer.times is not None:
        named = ", ".join(timecode(time.seconds) for time in answer.times) or "none"
        print(f"tieredkv: times named: {named}.", file=sys.stderr, flush=True)


def stats_lines(stats: Stats) -> list[str]:
    """One line per subject, with units."""
    heads = f"{stats.static_heads} static, {stats.dynamic_heads} dynamic"
    lines = {
        "prompt": f"{counted(stats.prompt_tokens, 'token')}, {stats.visual_tokens:,} of them visual",
        "answer": f"{counted(stats.new_tokens, 'token')}, the first after {stats.ttft_s:.2f} s{_rate(stats)}",
        "ingest": f"{stats.ingest_s:.1f} s, once for this video",
        "device": f"{size(stats.kv_device_peak_bytes)} for keys and values, of {size(stats.kv_cap_bytes)} allowed",
        "host": f"{size(stats.kv_host_bytes)} for keys and values; all of them take {size(stats.kv_full_bytes)}",
        "heads": f"{heads}; {counted(stats.selected_chunks, 'chunk')} selected{_hits(stats)}",
        "copied": f"{size(stats.moved_bytes)} to the device, {size(stats.prefetched_bytes)} of it ahead of its use",
    }
    if stats.disk_hit_rate is not None:
        lines["disk"] = f"{size(stats.disk_read_bytes)} read; {stats.disk_hit_rate:.1%} of copied chunks were in memory"
    if stats.unseen_mass is not None:
        lines["unseen"] = f"{stats.unseen_mass:.1%} of the attention, estimated; a larger gpu_kv_gb lowers it"
    lines["decoding"] = stats.decode_path
    if stats.damaged:
        lines["damaged"] = spans_text(stats.damaged)
    width = max(map(len, lines))
    return [f"{name:<{width}}  {text}" for name, text in lines.items()]


def _rate(stats: Stats) -> str:
    return "" if not stats.tpot_ms else f", {stats.tpot_ms:.1f} ms for each of the others"


def _hits(stats: Stats) -> str:
    return "" if stats.hit_rate is None else f", {stats.hit_rate:.1%} of them on the device already"


def counted(count: int, noun: str) -> str:
    """A number with its noun: "1 question", "2 questions"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
