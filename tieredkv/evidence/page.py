"""The evidence page: question, answer, moments and heat as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
import string
from pathlib import Path

from PIL import Image

from tieredkv.evidence.moments import Evidence
from tieredkv.evidence.strip import columns, percent, span, spread, ticks
from tieredkv.evidence.view import LONG_ANSWER, View, scaled
from tieredkv.progress import timecode

FRAME = 640
"""Longer side of a frame, in pixels."""
STRIP = 1000
"""Columns of the strip."""
LABEL = 30
"""Width of a moment's number, in columns."""
DASH = "\u2009\u2013\u2009"


def to_html(view: View) -> str:
    """The page, which needs no other file and runs no scripts."""
    evidence = view.evidence
    template = string.Template(Path(__file__).with_name("page.html").read_text("utf-8"))
    shape = (16, 9) if not view.frames else view.frames[0].size
    ratio = min(max(shape[0] / shape[1], 0.5), 2.5)
    width = 320 if ratio >= 1 else 200
    return template.substitute(
        title=html.escape(view.question or "Evidence"),
        question=html.escape(view.question),
        answer=html.escape(view.answer or "(no answer)"),
        long=" long" if len(view.answer) > LONG_ANSWER else "",
        strip=_strip(evidence),
        named=_named(view),
        moments="\n".join(_figure(view, place) for place in range(len(evidence))) or _NOTHING,
        note=html.escape(view.note()),
        ratio=f"{ratio:.4f}",
        wide=width,
    )


_NOTHING = '<p class="nothing">No moment stands out.</p>'


def _strip(evidence: Evidence) -> str:
    """The heat, the time axis below it and the numbers of the moments above it, as SVG."""
    length = evidence.end - evidence.start

    def x(time: float) -> float:
        return STRIP * (time - evidence.start) / length if length else 0.0

    parts = []
    heat = columns(evidence, STRIP, least=3)
    first = 0
    for place in range(1, STRIP + 1):
        if place == STRIP or round(heat[place], 2) != round(heat[first], 2):
            if round(heat[first], 2) > 0:
                parts.append(
                    f'<rect class="heat" x="{first}" y="40" width="{place - first}" height="44" '
                    f'opacity="{round(heat[first], 2):g}"/>'
                )
            first = place
    for time, text in ticks(evidence.start, evidence.end):
        at, side = x(time), "start" if x(time) < 20 else "end" if x(time) > STRIP - 20 else "middle"
        parts.append(f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="84" y2="90"/>')
        parts.append(f'<text class="time" x="{at:.1f}" y="106" text-anchor="{side}">{text}</text>')
    peaks = [x(moment.peak) for moment in evidence]
    for number, (peak, label) in enumerate(zip(peaks, spread(peaks, LABEL, 0, STRIP), strict=True), start=1):
        parts.append(f'<path class="lead" d="M{label:.1f} 24 V29 L{peak:.1f} 38"/>')
        parts.append(
            f'<a href="#moment-{number}"><circle class="mark" cx="{label:.1f}" cy="13" r="12"/>'
            f'<text class="number" x="{label:.1f}" y="17.5" text-anchor="middle">{number}</text></a>'
        )
    return "\n".join(parts)


def _named(view: View) -> str:
    """The times that the answer names, each a link to its frame."""
    if not view.named:
        return ""
    links, figures = [], []
    for number, (time, frame) in enumerate(view.named, start=1):
        at = timecode(time.seconds)
        links.append(f'<a href="#time-{number}">{at}</a>')
        figures.append(
            f'<figure id="time-{number}">{_picture(frame, f"frame at {at}")}<figcaption>{at}</figcaption></figure>'
        )
    return (
        f'<p class="times">Times named: {", ".join(links)}</p>\n<div class="moments">\n'
        + "\n".join(figures)
        + "\n</div>"
    )


def _figure(view: View, place: int) -> str:
    moment = view.evidence[place]
    inside = _picture(None if view.frames is None else view.frames[place], f"frame at {timecode(moment.peak)}")
    return (
        f'<figure id="moment-{place + 1}">{inside}<b>{place + 1}</b><i>{percent(moment.weight)}</i>'
        f"<figcaption>{span(moment, DASH)}</figcaption></figure>"
    )


def _picture(frame: Image.Image | None, alt: str) -> str:
    if frame is None:
        return '<div class="none">no frame</div>'
    buffer = io.BytesIO()
    scaled(frame, FRAME, FRAME).convert("RGB").save(buffer, "JPEG", quality=85)
    return f'<img alt="{alt}" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
