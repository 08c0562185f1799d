"""What the sheet and the page share: times as text, ticks, columns of heat, positions of labels."""

from __future__ import annotations

import math

import torch

from tieredkv.evidence.moments import Evidence, Moment
from tieredkv.progress import timecode

TICK_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)
"""Possible distances between ticks, in seconds."""
MOST_TICKS = 10


def span(moment: Moment, dash: str) -> str:
    """Start and end of a moment, rounded outwards to whole seconds."""
    last = math.ceil(moment.end - 1e-6)
    hours = last >= 3600
    return f"{timecode(moment.start, hours)}{dash}{timecode(last, hours)}"


def percent(share: float) -> str:
    """A share in percent, with one decimal below 10 %."""
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def ticks(start: float, end: float) -> list[tuple[float, str]]:
    """Times and labels of the axis: about ten at most, at multiples of one of `TICK_STEPS`."""
    length = max(end - start, 1e-6)
    step = next((one for one in TICK_STEPS if length / one < MOST_TICKS), 0)
    step = step or TICK_STEPS[-1] * math.ceil(length / TICK_STEPS[-1] / MOST_TICKS)
    first = math.ceil(start / step - 1e-9)
    return [(n * step, timecode(n * step, hours=end >= 3600)) for n in range(first, math.floor(end / step + 1e-9) + 1)]


def columns(evidence: Evidence, count: int, least: int) -> list[float]:
    """The heat as `count` numbers from 0 to 1: the maximum in each column, each step at least `least` columns wide."""
    heat, steps = evidence.heat, len(evidence.heat)
    top = float(heat.max()) if steps else 0.0
    out = torch.zeros(count, dtype=torch.float32, device="cpu")
    if top <= 0:
        return out.tolist()
    for step in range(steps):
        first, last = math.floor(step * count / steps), math.ceil((step + 1) * count / steps)
        if last - first < least:
            first = max(0, min(count - least, (first + last - least) // 2))
            last = first + least
        out[first:last] = out[first:last].clamp(min=float(heat[step]) / top)
    return out.tolist()


def spread(places: list[float], width: float, low: float, high: float) -> list[float]:
    """Centres of labels `width` wide, each near its place, without overlaps, in the order of `places`.

    Each is the mean of two positions: with overlaps resolved to the right, and to the left.
    """
    count = len(places)
    width = min(width, (high - low) / max(1, count))
    order = sorted(range(count), key=lambda i: places[i])
    right, left = [0.0] * count, [0.0] * count
    for rank, i in enumerate(order):
        edge = right[order[rank - 1]] + width if rank else low + width / 2
        right[i] = min(max(places[i], edge), high - width / 2 - (count - 1 - rank) * width)
    for rank, i in reversed(list(enumerate(order))):
        edge = left[order[rank + 1]] - width if rank + 1 < count else high - width / 2
        left[i] = max(min(places[i], edge), low + width / 2 + rank * width)
    return [(a + b) / 2 for a, b in zip(right, left, strict=True)]
