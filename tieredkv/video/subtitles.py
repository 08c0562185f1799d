"""Reads subtitles: from a text track of a video file, or from a file of subtitles, such as .srt or .vtt."""

from __future__ import annotations

import codecs
import hashlib
import html
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from tieredkv.errors import VideoError
from tieredkv.progress import timecode
from tieredkv.video import pyav as av
from tieredkv.video.container import reason, unreadable
from tieredkv.video.film import probe
from tieredkv.video.local_file import is_file_object, local_file

AUTO = "auto"
"""Instead of the path of a subtitle file: the video's own text track."""

_TEXT = {"subrip": "subrip", "srt": "subrip", "text": "subrip", "webvtt": "webvtt", "mov_text": "mov_text"}
_TEXT |= {"ass": "ass", "ssa": "ass"}
"""FFmpeg's names of codecs of text, and by which of four forms `shown_text` reads each."""
_LARGEST = 2**26
"""Bytes. A larger file is not subtitles."""
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))

_TIME = r"(?:\d+:)?\d+:\d+[.,]\d+"
_TIMES = re.compile(rf"\s*({_TIME})\s*-->\s*({_TIME})(?:\s|$)")
_CLAIMS_TIMES = re.compile(r"\s*-?\d+\s*:.*-->")
"""A line that can only be meant as a cue's times."""
_TAG = re.compile(r"</?(?:[biuscv]|font|span|lang|ruby|rt|br|p)(?:[\s.][^<>]*|/)?>|<[\d:.]+>", re.IGNORECASE)
_OVERRIDE = re.compile(r"\{\\[^}]*\}")
_BRACES = re.compile(r"\{[^}]*\}")
_DRAWING = re.compile(r"\{[^}]*\\p[1-9][^}]*\}.*?(?:\{[^}]*\\p0[^}]*\}|$)", re.DOTALL)


class Cue(NamedTuple):
    """What is shown from `start` to `end`, in seconds as players show them; lines of `text` are divided by "\\n"."""

    start: float
    end: float
    text: str


def read_cues(subtitles: str | os.PathLike[str], video: Any = None) -> list[Cue]:
    """The cues of a subtitle file, or with `AUTO` of the best text track of the video, in order of time.

    video: a path, or a file object.

    The best track is, in this order, one that is not only for foreign speech (forced), the default, the first. Cues may
    overlap. Those without text are left out. Raises `VideoError` if there is no text track, or a file cannot be read.
    """
    if subtitles == AUTO:
        if is_file_object(video):
            video = local_file(video)
        if not isinstance(video, str | os.PathLike):
            raise VideoError(f"subtitles={AUTO!r} is for a video file: give the path of a subtitle file.")
        return _of_video(Path(video), str(video))
    return _of_file(Path(subtitles))


def shown_text(kind: str, data: bytes) -> str:
    """The text of one packet as it is shown: without tags, entities as characters, no empty lines.

    kind: "subrip", "webvtt", "ass" or "mov_text". Bytes that are not UTF-8 are replaced.
    """
    if kind == "mov_text":
        data = data[2 : 2 + int.from_bytes(data[:2], "big")]  # styles follow
        encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_BE, codecs.BOM_UTF16_LE) else "utf-8"
        text = data.decode(encoding, "replace")
    else:
        text = data.decode("utf-8", "replace")
    if kind == "ass":
        text = text.split(",", 8)[-1]  # order, layer, style, name, three margins and effect precede it
        text = _BRACES.sub("", _DRAWING.sub("", text))
        text = re.sub(r"\\[Nn]", "\n", text).replace(r"\h", " ")
    elif kind != "mov_text":
        text = html.unescape(_TAG.sub("", _OVERRIDE.sub("", text)))
    lines = (line.strip() for line in text.replace("\0", "").replace("\N{NO-BREAK SPACE}", " ").splitlines())
    return "\n".join(line for line in lines if line)


def decode_text(name: str, data: bytes) -> str:
    """The text of a subtitle file called `name`. Raises `VideoError` unless it is UTF-8, or UTF-16 with a mark."""
    mark, encoding = next((pair for pair in _BOMS if data.startswith(pair[0])), (b"", "utf-8"))
    data = data[len(mark) :]
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line, what = data[: error.start].decode(encoding).count("\n"), f"bytes that are not {encoding.upper()}"
    else:
        if "\0" not in text:
            return text.replace("\r\n", "\n").replace("\r", "\n")
        line, what = text[: text.index("\0")].count("\n"), "a zero byte"
    raise VideoError(f"{name}: line {line + 1} has {what}: save the subtitles as UTF-8.")


def _of_file(path: Path) -> list[Cue]:
    try:
        if not path.is_file():
            raise VideoError(f"{path}: no such file of subtitles.")
        if (size := path.stat().st_size) > _LARGEST:
            raise VideoError(f"{path} has {size:,} bytes, too many for subtitles: give an .srt or .vtt file.")
        text = decode_text(str(path), path.read_bytes())
    except (OSError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"{path}: cannot be read ({reason(error)}).") from None
    cues = parse_cues(text, str(path))
    if not cues:
        raise VideoError(f"{path} has no subtitles: give an .srt or .vtt file with cues such as 00:00:01,000 --> ...")
    return cues


def parse_cues(text: str, name: str) -> list[Cue]:
    """The cues of a file's text, in order of time. name: for messages. Raises `VideoError` for damaged times."""
    if text.lstrip().startswith("[Script Info]"):
        try:
            with closing(av.open(io.BytesIO(text.encode()), format="ass")) as container:
                return _in_order(_cues(container, container.streams.subtitles[0], 0.0))
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{name}: cannot be read ({reason(error)}).") from None
    return _in_order(_timed(text.split("\n"), "webvtt" if text.startswith("WEBVTT") else "subrip", name))


def _timed(lines: list[str], kind: str, name: str) -> Iterator[Cue]:
    """The cues of lines of SubRip, whose text may have empty lines, or of WebVTT, whose text ends at the first."""
    begins = [number for number, line in enumerate(lines) if _CLAIMS_TIMES.match(line)]
    for begin, following in zip_longest(begins, begins[1:]):
        times = _TIMES.match(lines[begin])
        if times is None:
            raise VideoError(f"{name}: line {begin + 1} has no valid times: {lines[begin].strip()[:60]}")
        shown = lines[begin + 1 : following]
        if kind == "webvtt" and "" in shown:
            shown = shown[: shown.index("")]
        elif kind == "subrip" and following is not None and shown and shown[-1].strip().isdecimal():
            del shown[-1]  # the next cue's number
        start, end = (_seconds(time) for time in times.groups())
        yield Cue(start, max(start, end), shown_text(kind, "\n".join(shown).encode()))


def _seconds(time: str) -> float:
    hours, minutes, seconds = ["0", *time.replace(",", ".").split(":")][-3:]
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def subtitle_lines(cues: Sequence[Cue], timed: bool) -> str:
    """Cues as a prompt holds them, a line for each. timed: with when each is shown, as in "[1:02]"."""
    times = (f"[{timecode(cue.start)}] " if timed else "" for cue in cues)
    return "".join(f"Subtitle: {time}{' '.join(cue.text.split())}\n" for time, cue in zip(times, cues, strict=True))


def shown_during(cues: Iterable[Cue], start: float, end: float) -> tuple[Cue, ...]:
    """Those that are shown at some time between two, in seconds."""
    return tuple(cue for cue in cues if cue.start < end and cue.end > start)


def subtitles_hash(cues: Sequence[Cue]) -> str | None:
    """SHA-256 of cues, in hexadecimal; None if there are none."""
    return hashlib.sha256(repr(list(map(tuple, cues))).encode()).hexdigest() if cues else None


def _of_video(path: Path, name: str) -> list[Cue]:
    try:
        with closing(av.open(str(path.absolute()), metadata_errors="replace")) as container:
            tracks = list(container.streams.subtitles)
            texts = [track for track in tracks if _codec(track) in _TEXT]
            if not texts:
                found = f"not text but {', '.join(sorted({_codec(track) for track in tracks}))}" if tracks else "none"
                raise VideoError(f"{name}: its subtitle tracks are {found}: give an .srt or .vtt file of subtitles.")
            zero = probe(path, end=0.0, skip_damaged=True).times.zero
            return _in_order(_cues(container, max(texts, key=_rank), zero))
    except (av.FFmpegError, OSError) as error:
        raise unreadable(path, error) from None


def _codec(track: Any) -> str:
    return track.codec_context.name if track.codec_context is not None else "an unknown codec"


def _rank(track: Any) -> tuple[bool, bool, int]:
    kinds = av.stream.Disposition
    return kinds.forced not in track.disposition, kinds.default in track.disposition, -track.index


def _cues(container: Any, track: Any, zero: float) -> Iterator[Cue]:
    """The cues of an open track, timed from `zero`. A cue without a length ends where it starts."""
    kind = _TEXT[_codec(track)]
    for packet in container.demux(track):
        if packet.size and packet.pts is not None:
            start = float(packet.pts * packet.time_base) - zero
            yield Cue(
                start,
                start + max(0.0, float((packet.duration or 0) * packet.time_base)),
                shown_text(kind, bytes(packet)),
            )


def _in_order(cues: Iterable[Cue]) -> list[Cue]:
    """Cues that are shown, in order, each once; one without a length is shown until the next begins."""
    ordered = sorted({cue for cue in cues if cue.end > 0 or cue.start >= 0})
    cues = []
    for cue, following in zip_longest(ordered, ordered[1:]):
        if cue.text:
            end = following.start if cue.end == cue.start and following is not None else cue.end
            cues.append(Cue(max(0.0, cue.start), end, cue.text))
    return cues
