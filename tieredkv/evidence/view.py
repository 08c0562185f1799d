"""What the page and the sheet show: question, answer, moments and their frames."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tieredkv.evidence.moments import Evidence
from tieredkv.evidence.named_times import NamedTime
from tieredkv.progress import spans_text, timecode
from tieredkv.video.media import Video, media_of
from tieredkv.video.sampling import Sampling

LARGEST = 1600
"""Longer side of a frame, in pixels: the width of a sheet. Larger frames are reduced to it."""
PIXEL_ART = 160
"""Frames whose longer side is below this keep square pixels when enlarged."""
LONG_ANSWER = 140
"""Answers of more characters are set in smaller type."""


@dataclass(frozen=True, slots=True)
class View:
    """What is drawn. Question and answer are untrusted text."""

    question: str
    answer: str
    evidence: Evidence
    frames: list[Image.Image] | None
    """One per moment; None if there is no video to take them from."""
    video: str
    """Name of the video; empty if unknown."""
    named: tuple[tuple[NamedTime, Image.Image | None], ...] = ()
    """The times that the answer names, with their frames."""

    def note(self) -> str:
        """The line below the moments."""
        parts = [self.video, f"{timecode(self.evidence.start)} to {timecode(self.evidence.end)}"]
        if len(self.evidence):
            parts.append("%: share of the attention that question and answer paid to the video")
        if self.evidence.damaged:
            parts.append(f"could not be read: {spans_text(self.evidence.damaged)}")
        if self.frames is None:
            parts.append("no frames, as the video was not given")
        return " \u00b7 ".join(part for part in parts if part)


def moment_frames(evidence: Evidence, video: Any, source_fps: float | None = None) -> list[Image.Image]:
    """The frame at each moment's peak; see `frames_at`."""
    peaks = [moment.peak for moment in evidence]
    return frames_at(peaks, video, source_fps, skip_damaged=bool(evidence.damaged))


def frames_at(
    times: Iterable[float], video: Any, source_fps: float | None = None, skip_damaged: bool = False
) -> list[Image.Image]:
    """The frames shown at some times, in seconds, decoded from the video, at most `LARGEST` pixels wide and high."""
    frames, (medium, *_) = [], media_of(video)
    if isinstance(medium, Video):
        medium = Video(medium.source)  # whatever part of it was read
    for time in times:
        source = medium.open(Sampling(1.0, source_fps, 1, time, skip_damaged=skip_damaged))
        pictures = source.frames()
        frame = Image.fromarray(next(pictures).copy())
        frames.append(scaled(frame, LARGEST, LARGEST) if max(frame.size) > LARGEST else frame)
        pictures.close()  # type: ignore[attr-defined]
    return frames


def scaled(frame: Image.Image, width: int, height: int) -> Image.Image:
    """The frame, resized to the largest size that fits."""
    factor = min(width / frame.width, height / frame.height)
    size = max(1, round(frame.width * factor)), max(1, round(frame.height * factor))
    enlarged = factor > 1 and max(frame.size) < PIXEL_ART
    return frame.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
