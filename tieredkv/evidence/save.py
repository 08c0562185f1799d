"""Evidence as a file: a contact sheet as PNG, or a self-contained page as HTML."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

from tieredkv.errors import OptionError
from tieredkv.evidence import page, sheet
from tieredkv.evidence.moments import Evidence
from tieredkv.evidence.named_times import NamedTime
from tieredkv.evidence.target import check_target
from tieredkv.evidence.view import View, frames_at, moment_frames
from tieredkv.storage.atomic import replace_file
from tieredkv.video.frames import states_its_rate
from tieredkv.video.media import Medium, Video, media_of


class Answer(Protocol):
    """The parts of an answer, such as a `Generation`, that are used here."""

    @property
    def text(self) -> str: ...

    @property
    def evidence(self) -> Evidence | None: ...

    @property
    def times(self) -> tuple[NamedTime, ...] | None: ...


def save_evidence(
    answer: Answer,
    path: str | Path,
    *,
    question: str = "",
    video: Any = None,
    source_fps: float | None = None,
    medium: int | None = None,
) -> Path:
    """Write what an answer attended to: its moments with their frames, and the attention over the whole video.

    path: ends in .png (a contact sheet) or .html (one page that needs no other file). question: shown above the answer.
    video: the path or frames that the question was about, from which frames are taken; if None, only times are shown.
    source_fps: frames per second of frames given as arrays. medium: which of several videos and pictures is drawn,
    counted from 0; `video` is then that one, or the list of all. An older file is replaced whole or not at all. Raises
    `OptionError`, `OutputError` if the file cannot be written, and `VideoError` if frames cannot be read.
    """
    path = Path(path)
    check_target(path)
    if answer.evidence is None:
        raise OptionError("this answer has no evidence: ask with evidence=True.")
    evidence, shown = _part(answer.evidence, medium), None if video is None else _shown(video, medium)
    source = None if shown is None else shown.source
    if isinstance(source, Iterator):
        raise OptionError("the frames of an iterator can be read only once: give them as a list, or the file.")
    if isinstance(shown, Video) and source_fps is None and not states_its_rate(source):
        raise OptionError("the video is given as frames: give source_fps=, their number per second.")
    frames = None if shown is None else moment_frames(evidence, shown, source_fps)
    name = Path(str(source)).name if isinstance(source, str | os.PathLike) else ""
    times = () if path.suffix.lower() == ".png" else answer.times or ()  # the sheet has no links
    # At the end nothing is shown any more: the frame just before it is.
    moments = [max(evidence.start, min(time.seconds, evidence.end - 0.5)) for time in times]
    pictures = None if shown is None else frames_at(moments, shown, source_fps, bool(evidence.damaged))
    named = tuple(zip_longest(times, pictures or ()))
    view = View(_plain(question), _plain(answer.text), evidence, frames, _plain(name), named)
    data = _png(view) if path.suffix.lower() == ".png" else page.to_html(view).encode()
    with replace_file(path, len(data)) as part:
        part.write_bytes(data)
    return path


def _part(evidence: Evidence, medium: int | None) -> Evidence:
    """The evidence of one medium. Raises `OptionError` unless `medium` says which of several."""
    count = max(1, len(evidence.parts))
    if medium is None and count == 1:
        return evidence
    if isinstance(medium, bool) or not isinstance(medium, int) or not 0 <= medium < count:
        given = "" if medium is None else f"medium={medium!r} is not valid: "
        raise OptionError(
            f"{given}the answer is about {count} videos and pictures, of which one is drawn: give medium=, 0 to "
            f"{count - 1}."
        )
    return evidence.parts[medium] if evidence.parts else evidence


def _shown(video: Any, medium: int | None) -> Medium:
    """The video or picture to take frames from."""
    if medium is None:
        return media_of(video)[0]
    media = media_of(video)
    if len(media) == 1 and not isinstance(video, list | tuple):
        return media_of([video])[0]
    if medium >= len(media):
        raise OptionError(f"video= lists {len(media)} videos and pictures, without one for medium={medium}.")
    return media[medium]


def _png(view: View) -> bytes:
    buffer = io.BytesIO()
    sheet.draw(view).save(buffer, "PNG")
    return buffer.getvalue()


def _plain(text: str) -> str:
    """Text in one line that any Unicode encoding can write, without control characters."""
    text = text.encode("utf-8", "replace").decode()
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
