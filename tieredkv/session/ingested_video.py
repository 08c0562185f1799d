"""What a session knows about its videos besides keys and values: their sources, and their places in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tieredkv.models.chat_template import ChatTemplate
from tieredkv.models.families.base import Kind, Positions, VideoFamily, VideoGrid
from tieredkv.session.results import IngestStats
from tieredkv.video.sampling import Sampling


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """The file, or the frames, that were read. Times are seconds of the file."""

    name: str
    sha256: str
    fps: float
    """Frames sampled per second."""
    start: float
    """When the first frame is shown."""
    seconds: float | None
    """Length of the span sampled; None: unknown."""
    subtitles: str | None = None
    """SHA-256 of the subtitles written between the frames; None: there are none."""

    def end(self, frames: int) -> float:
        """When the last of `frames` frames ends: when the next would be shown, or at the end of the span."""
        end = self.start + frames / self.fps
        return end if self.seconds is None else min(end, self.start + self.seconds)


@dataclass(frozen=True, slots=True)
class Medium:
    """A video or a still picture of a prompt, and the text before it."""

    kind: Kind
    text_ids: tuple[int, ...]
    """Token ids of everything between the medium before, or the beginning of the prompt, and its first step."""
    grid: VideoGrid
    facts: VideoFacts
    frames: int
    """How many were read."""
    damaged: tuple[tuple[float, float], ...] = ()
    """The seconds of the file, from and to, that could not be read."""
    shift: int = 0
    """Added to the positions that its tokens, and those after it, would have in a prompt that began with its text."""

    @property
    def tokens(self) -> int:
        """Prompt tokens, those of the text before it included."""
        return len(self.text_ids) + self.grid.tokens

    @property
    def span(self) -> tuple[float, float]:
        """Seconds of the file at which the first frame is shown and the last one ends; both 0 of a still picture."""
        return (0.0, 0.0) if self.kind == "image" else (self.facts.start, self.facts.end(self.frames))

    @property
    def last_times(self) -> list[float]:
        """Seconds of the file at which the frames of the last step are shown."""
        frames = range((self.grid.steps - 1) * self.grid.frames_per_step, self.frames)
        return [self.facts.start + index / self.facts.fps for index in frames]

    def is_visual(self) -> torch.Tensor:
        """Which of its tokens are visual, `(tokens,)`."""
        return torch.cat((torch.zeros(len(self.text_ids), dtype=torch.bool, device="cpu"), self.grid.is_visual()))

    def positions(
        self, family: VideoFamily, model: Any, begin: int, stop: int, rule: Positions, trailing: int = 0
    ) -> torch.Tensor:
        """Position ids `(axes, stop - begin)` of tokens from `begin` on, counted from the first of its text; those
        after the medium are text. family: its adapter. trailing: of the grid."""
        grid = replace(self.grid, trailing=trailing)
        return family.positions(model, len(self.text_ids), grid, begin, stop, rule) + self.shift


@dataclass(frozen=True, slots=True)
class Place:
    """Where a video and the text before it begin in a prompt."""

    tokens: int = 0
    """Prompt tokens before."""
    shift: int = 0
    """`Medium.shift`."""


@dataclass(frozen=True, slots=True)
class IngestedVideo:
    """Videos and pictures whose keys and values are in a cache, and the beginning of every prompt about them.

    What is not a total describes the first of them.
    """

    grid: VideoGrid
    positions: Positions
    head: str
    """The prompt's text before the first."""
    head_ids: tuple[int, ...]
    """Token ids of everything before the first step."""
    facts: VideoFacts
    ingest_s: float
    """Seconds from the request to a session that can be asked."""
    stats: IngestStats
    sampling: Sampling | None = None
    """As asked for; None: loaded from a file that does not say."""
    system: str | None = None
    """The system prompt, which is part of `head`; None: none was given."""
    kind: Kind = "video"
    more: tuple[Medium, ...] = ()
    """Those after the first."""

    @property
    def media(self) -> tuple[Medium, ...]:
        """All of them, in the order of the prompt."""
        frames = self.stats.frames - sum(each.frames for each in self.more)
        damaged = self.stats.damaged[: len(self.stats.damaged) - sum(len(each.damaged) for each in self.more)]
        return (Medium(self.kind, self.head_ids, self.grid, self.facts, frames, damaged), *self.more)

    @property
    def last(self) -> Medium:
        """The one before the question."""
        return self.media[-1]

    def end(self, model: Any, template: ChatTemplate) -> Place:
        """The place after the last one."""
        last, family = self.last, template.families[len(self.more)]
        position = last.positions(family, model, last.tokens, last.tokens + 1, self.positions)
        return Place(self.tokens, int(position[0, 0]))

    def followed_by(self, other: IngestedVideo, place: Place) -> IngestedVideo:
        """These and another, which was ingested as if it were alone, at `place`."""
        medium = replace(other.last, shift=place.shift)
        return replace(self, stats=IngestStats.total((self.stats, other.stats)), more=(*self.more, medium))

    @property
    def head_tokens(self) -> int:
        """Prompt tokens before the first step."""
        return len(self.head_ids)

    @property
    def tokens(self) -> int:
        """Prompt tokens in the cache."""
        return sum(each.tokens for each in self.media)

    @property
    def visual_tokens(self) -> int:
        """Those of them that are visual."""
        return sum(each.grid.visual_tokens for each in self.media)

    def is_visual(self) -> torch.Tensor:
        """Which of its tokens are visual, `(tokens,)`."""
        return torch.cat([each.is_visual() for each in self.media])

    def ids(self, visual_ids: Sequence[int]) -> list[int]:
        """Its token ids as the model's processor writes them. visual_ids: what stands for visual tokens of each."""
        written = zip(self.media, visual_ids, strict=True)
        return [token for each, visual in written for token in (*each.text_ids, *each.grid.ids(visual))]

    def after(self, family: VideoFamily, model: Any, tokens: int, trailing: int) -> torch.Tensor:
        """Position ids `(axes, tokens)` of the text after the last one. family: its adapter. trailing: of its grid."""
        last = self.last
        return last.positions(family, model, last.tokens, last.tokens + tokens, self.positions, trailing)
