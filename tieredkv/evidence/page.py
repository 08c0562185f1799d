"""Evidence to look at: a contact sheet of the moments as PNG, or one self-contained page as HTML."""

from __future__ import annotations

import base64
import html
import io
import os
import string
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from tieredkv.errors import OptionError
from tieredkv.evidence.moments import Evidence
from tieredkv.evidence.strip import columns, percent, span, spread, ticks
from tieredkv.progress import clock
from tieredkv.video.frames import Sampling, open_video

if TYPE_CHECKING:
    from tieredkv.session.results import Generation

SUFFIXES = (".png", ".html")
FRAME = 640
"""Pixels of the longer side of a page's frames."""
LARGE = 1600
"""Pixels of the longer side beyond which no frame is kept: what a sheet is wide."""
SMALL = 160
"""Frames whose longer side is below this keep their pixels square when enlarged."""
STRIP = 1000
"""Columns of a page's strip."""
LABEL = 30
"""Columns that the number of a moment takes."""
LONG_ANSWER = 140
"""Characters beyond which an answer is set in smaller type."""
DASH = "\u2009\u2013\u2009"


@dataclass(frozen=True, slots=True)
class Shown:
    """What is drawn. Question and answer are anybody's text."""

    question: str
    answer: str
    evidence: Evidence
    frames: list[Image.Image] | None
    """Of each moment; None where there is no video to take them from."""
    video: str
    """Name of the video; empty where it is not known."""


def check_target(path: Path) -> None:
    """Raise `OptionError` for a file that `save_evidence` could not write, before there is anything to write."""
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"{path}: give a file name that ends in .png or .html.")
    try:
        if path.is_dir():
            raise OptionError(f"{path} is a folder: give a file name.")
        if not path.absolute().parent.is_dir():
            raise OptionError(f"{path}: there is no folder {path.absolute().parent}.")
        part = _part(path)
        part.touch()
        part.unlink()
    except (OSError, ValueError) as error:  # a null or half a character in its name
        raise _unwritable(path, error) from None


def save_evidence(
    answer: Generation, path: str | Path, *, question: str = "", video: Any = None, source_fps: float | None = None
) -> Path:
    """Write what an answer looked at: moments with their frames, and the heat over the whole video.

    path: ends in .png (a contact sheet) or .html (one page that needs no other file). question: shown above the answer.
    video: the path or frames that the question was about, from which frames are taken; None: times alone. source_fps:
    of frames given as arrays. Replaces an older file at once or, if anything goes wrong, not at all. Raises
    `OptionError` and, where frames cannot be read, `VideoError`.
    """
    path = Path(path)
    check_target(path)
    if answer.evidence is None:
        raise OptionError("this answer has no evidence: ask with evidence=True.")
    if video is not None and source_fps is None and not isinstance(video, str | Path):
        raise OptionError("the video is given as frames: give source_fps=, how many of them are a second.")
    frames = None if video is None else moment_frames(answer.evidence, video, source_fps)
    name = Path(video).name if isinstance(video, str | Path) else ""
    shown = Shown(_plain(question), _plain(answer.text), answer.evidence, frames, _plain(name))
    if path.suffix.lower() == ".png":
        from tieredkv.evidence.sheet import draw

        made = io.BytesIO()
        draw(shown).save(made, "PNG")
        data = made.getvalue()
    else:
        data = page(shown).encode()
    part = _part(path)
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return path


def moment_frames(evidence: Evidence, video: Any, source_fps: float | None = None) -> list[Image.Image]:
    """The frame of each moment's peak, decoded from the video; large ones made smaller."""
    frames = []
    for moment in evidence:
        source = open_video(video, Sampling(1.0, source_fps=source_fps, max_frames=1, start=moment.peak))
        pictures = source.frames()
        frame = Image.fromarray(next(pictures).copy())
        frames.append(scaled(frame, LARGE, LARGE) if max(frame.size) > LARGE else frame)
        pictures.close()  # type: ignore[attr-defined]
    return frames


def scaled(frame: Image.Image, width: int, height: int) -> Image.Image:
    """The frame, as large as fits."""
    factor = min(width / frame.width, height / frame.height)
    size = max(1, round(frame.width * factor)), max(1, round(frame.height * factor))
    enlarged = factor > 1 and max(frame.size) < SMALL
    return frame.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def page(shown: Shown) -> str:
    """The HTML page."""
    evidence = shown.evidence
    template = string.Template(Path(__file__).with_name("page.html").read_text("utf-8"))
    shape = (16, 9) if not shown.frames else shown.frames[0].size
    ratio = min(max(shape[0] / shape[1], 0.5), 2.5)
    wide = 320 if ratio >= 1 else 200
    return template.substitute(
        title=html.escape(shown.question or "Evidence"),
        question=html.escape(shown.question),
        answer=html.escape(shown.answer or "(no answer)"),
        long=" long" if len(shown.answer) > LONG_ANSWER else "",
        strip=_strip(evidence),
        moments="\n".join(_figure(shown, place) for place in range(len(evidence))) or _NOTHING,
        note=html.escape(note(shown)),
        ratio=f"{ratio:.4f}",
        wide=wide,
    )


_NOTHING = '<p class="nothing">No moment stands out.</p>'


def note(shown: Shown) -> str:
    """The line below the moments."""
    parts = [shown.video, f"{clock(shown.evidence.start)} to {clock(shown.evidence.end)}"]
    if len(shown.evidence):
        parts.append("%: share of the attention that question and answer paid the video")
    if shown.frames is None:
        parts.append("no frames, as the video was not at hand")
    return " \u00b7 ".join(part for part in parts if part)


def _strip(evidence: Evidence) -> str:
    """The heat and the axis below it, as SVG."""
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


def _figure(shown: Shown, place: int) -> str:
    moment = shown.evidence[place]
    inside = '<div class="none">no frame</div>'
    if shown.frames is not None:
        frame, made = shown.frames[place], io.BytesIO()
        scaled(frame, FRAME, FRAME).convert("RGB").save(made, "JPEG", quality=85)
        data = base64.b64encode(made.getvalue()).decode()
        inside = f'<img alt="frame at {clock(moment.peak)}" src="data:image/jpeg;base64,{data}">'
    return (
        f'<figure id="moment-{place + 1}">{inside}<b>{place + 1}</b><i>{percent(moment.weight)}</i>'
        f"<figcaption>{span(moment, DASH)}</figcaption></figure>"
    )


def _plain(text: str) -> str:
    """Text that any encoding of Unicode can write, in one line, without what moves a cursor."""
    text = text.encode("utf-8", "replace").decode()
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def _unwritable(path: Path, error: OSError | ValueError) -> OptionError:
    reason = getattr(error, "strerror", None) or error
    return OptionError(f"{str(path)[:200]} cannot be written ({reason}): give another file name.")
