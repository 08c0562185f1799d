"""Evidence: the moments of a video that a question and its answer attended to, from recorded attention (ours).

There is one row of attention per token of the question, exact, and one per decoding step. Rows are combined by their
maximum, not their sum: one row that attends to one place is stronger evidence than many that attend everywhere. What
all rows of the question attend to, whatever is asked, is subtracted first. Shapes: `S` temporal steps of the video.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from tieredkv.cache.looks import Looks
from tieredkv.models.families.base import VideoGrid

LONGEST_S = 4.0
"""Longest moment, in seconds; the shortest is one step of the video."""
MOST = 12
"""Maximum number of moments of an answer."""
EDGE = 0.5
"""A moment extends while attention is at least this share of its peak."""
FAINT = 0.1
"""Peaks below this share of the highest are ignored."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A few seconds of a video that were attended to. Times are seconds on the file's clock."""

    start: float
    end: float
    weight: float
    """Its share of the attention to the video, once what all rows of the question have in common is subtracted."""
    peak: float
    """Time of the frame with the most attention."""
    medium: int = 0
    """Which of the prompt's videos and pictures it is of, counted from 0. All times of a picture are 0."""

    def as_dict(self) -> dict[str, float | int]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What an answer attended to. Iterates over its moments, best first."""

    moments: tuple[Moment, ...]
    heat: torch.Tensor = field(repr=False)
    """`(S,)`: attention to each step of the video; sums to 1, or all 0 if no row attended to the video."""
    start: float
    """Second of the file at which the part that was read begins."""
    end: float
    """Second of the file at which it ends; the last step may be shorter."""
    seconds_per_step: float
    tokens: tuple[tuple[Moment, ...], ...] | None = None
    """With `evidence="tokens"`, moments of each generated token: those of the row that predicted it."""
    parts: tuple[Evidence, ...] = ()
    """Of a prompt that shows several videos and pictures, the evidence of each: its moments, and its part of `heat`.
    Times and steps above are then those of the first. Empty if there is one."""
    source: str = ""
    """The video's name: its path, or what else it was called when it was read; of several, the first one's."""

    damaged: tuple[tuple[float, float], ...] = ()
    """The seconds of the video, from and to, that could not be read (`skip_damaged`); others were shown for them."""

    def __iter__(self) -> Iterator[Moment]:
        return iter(self.moments)

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, index: int) -> Moment:
        return self.moments[index]


def step_of(tokens: torch.Tensor, head: int, video: VideoGrid) -> torch.Tensor:
    """Temporal step of the video for each of the prompt's `tokens`, given by index; -1 for tokens that are not visual.

    head: tokens of the prompt before the video.
    """
    index = tokens - head
    inside = index.clamp(0, video.tokens - 1)
    visual = (index >= 0) & (index < video.tokens - video.closing) & video.is_visual()[inside]
    return torch.where(visual, video.step_of(inside), -1)


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def by_step(mass: torch.Tensor, first_chunk: int, chunk_tokens: int, head: int, video: VideoGrid) -> torch.Tensor:
    """Attention `(rows, n)` to chunks from `first_chunk` on, as attention to the video's steps: `(rows, S)`.

    The attention to a chunk is spread evenly over its tokens; the part on text is left out.
    """
    first = first_chunk * chunk_tokens
    token = torch.arange(mass.shape[1] * chunk_tokens, device="cpu")
    step = step_of(first + token, head, video)
    pairs = torch.stack((token // chunk_tokens, step))[:, step >= 0]
    (chunk, step), tokens = pairs.unique(dim=1, return_counts=True)  # tokens that a chunk shares with a step
    share = mass[:, chunk] * (tokens.float() / chunk_tokens)
    return _zeros(mass.shape[0], video.steps).index_add_(1, step, share)


def find_moments(
    heat: torch.Tensor,
    start: float,
    end: float,
    seconds_per_step: float,
    frames_per_step: int = 2,
    everywhere: torch.Tensor | None = None,
) -> tuple[Moment, ...]:
    """The best moments of a video by the attention `(S,)` to its steps: best first, without overlaps.

    start, end: seconds between which the video was read. Steps are counted from its start; the last may be shorter. A
    peak is the time of the last frame of its step. everywhere: the attention to all steps of a prompt that shows more
    than this video, of which weights are shares and by which peaks are faint.
    """
    frame = seconds_per_step / frames_per_step
    last_frame = start + frame * max(0, math.ceil((end - start) / frame - 1e-6) - 1)
    everywhere = heat if everywhere is None else everywhere
    total = float(everywhere.sum())
    if total <= 0:
        return ()
    left, longest = heat.tolist(), max(1, int(LONGEST_S / seconds_per_step + 1e-9))
    least = FAINT * float(everywhere.max())
    moments: list[Moment] = []
    while len(moments) < MOST and max(left) >= least:
        peak = left.index(max(left))
        first, last = _reach(left, peak, longest)
        begin, finish = (min(end, start + place * seconds_per_step) for place in (first, last + 1))
        shown = min(last_frame, start + peak * seconds_per_step + (frames_per_step - 1) * frame)
        moments.append(Moment(begin, finish, sum(left[first : last + 1]) / total, shown))
        for place in _slopes(left, first, last):
            left[place] = 0.0
    return tuple(sorted(moments, key=lambda moment: -moment.weight))


def _reach(heat: list[float], peak: int, longest: int) -> tuple[int, int]:
    """First and last step of the moment around a peak, at most `longest` steps long."""
    first = last = peak
    while last - first + 1 < longest:
        before = heat[first - 1] if first > 0 else 0.0
        after = heat[last + 1] if last + 1 < len(heat) else 0.0
        if max(before, after) < EDGE * heat[peak] or max(before, after) <= 0:
            break
        first, last = (first - 1, last) if before >= after else (first, last + 1)
    return first, last


def _slopes(heat: list[float], first: int, last: int) -> range:
    """The steps of a moment and of its slopes, along which attention falls. They form no further moment."""
    while first > 0 and 0 < heat[first - 1] < heat[first]:
        first -= 1
    while last + 1 < len(heat) and 0 < heat[last + 1] < heat[last]:
        last += 1
    return range(first, last + 1)


@dataclass(frozen=True, slots=True)
class Shown:
    """A video or picture of the prompt."""

    head: int
    """Prompt tokens before it."""
    grid: VideoGrid
    span: tuple[float, float]
    """The seconds of the file that were read, begin and end; both 0 of a picture."""
    source: str = ""
    """Its name."""
    damaged: tuple[tuple[float, float], ...] = ()
    """The seconds that could not be read."""

    def moments(self, heat: torch.Tensor, everywhere: torch.Tensor, medium: int) -> tuple[Moment, ...]:
        """Its moments, as the `medium`-th, by the attention to its steps and to those of all."""
        grid = self.grid
        found = find_moments(heat, *self.span, grid.seconds_per_step, grid.frames_per_step, everywhere)
        return tuple(replace(moment, medium=medium) for moment in found)


def collect(looks: Looks, rows: int, heads: int, shown: Sequence[Shown], tokens: int, each: bool) -> Evidence:
    """The evidence of an answer of `tokens` tokens, from recorded attention.

    rows: how many of the scored rows, counted from the last, belong to the question. heads: query heads of all layers,
    over which those rows are summed. shown: the videos and pictures of the prompt. each: also find moments of every
    token. Here `S` counts the steps of all of them.
    """
    c, lengths = looks.chunk_tokens, [one.grid.steps for one in shown]

    def to_steps(mass: torch.Tensor, first_chunk: int) -> torch.Tensor:
        return torch.cat([by_step(mass, first_chunk, c, one.head, one.grid) for one in shown], dim=1)

    question_rows = to_steps(looks.question[-rows:] / heads, 0)
    steps = torch.stack(looks.steps) / max(1, looks.heads) if looks.steps else _zeros(0, 0)
    answer_rows = to_steps(steps, looks.first_chunk)
    common = question_rows.amin(0) if len(question_rows) > 1 else _zeros(sum(lengths))
    question_rows, answer_rows = (question_rows - common).clamp(min=0), (answer_rows - common).clamp(min=0)

    def of_each(heat: torch.Tensor) -> list[tuple[Moment, ...]]:
        parts = zip(shown, heat.split(lengths), strict=True)
        return [one.moments(part, heat, number) for number, (one, part) in enumerate(parts)]

    def best(found: list[tuple[Moment, ...]]) -> tuple[Moment, ...]:
        return tuple(sorted((moment for part in found for moment in part), key=lambda moment: -moment.weight)[:MOST])

    first = question_rows.amax(0)
    heat = torch.cat((first.unsqueeze(0), answer_rows)).amax(0)
    share = heat / heat.sum().clamp(min=torch.finfo(torch.float32).tiny)
    found, token_rows = of_each(heat), (first, *answer_rows)[:tokens] if each else ()
    parts = [
        Evidence(moments, part, *one.span, one.grid.seconds_per_step, source=one.source, damaged=one.damaged)
        for moments, part, one in zip(found, share.split(lengths), shown, strict=True)
    ]
    return replace(
        parts[0],
        moments=best(found),
        heat=share,
        tokens=tuple(best(of_each(row)) for row in token_rows) if each else None,
        parts=tuple(parts) if len(parts) > 1 else (),
    )
