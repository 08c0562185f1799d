"""What a session knows about its video besides keys and values: its source, and its place in a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tieredkv.models.families.base import Positions, VideoGrid
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

    def end(self, frames: int) -> float:
        """When the last of `frames` frames ends: when the next would be shown, or at the end of the span."""
        end = self.start + frames / self.fps
        return end if self.seconds is None else min(end, self.start + self.seconds)


@dataclass(frozen=True, slots=True)
class IngestedVideo:
    """A video whose keys and values are in a cache, and the beginning of every prompt about it."""

    grid: VideoGrid
    positions: Positions
    head: str
    """The prompt's text before the video."""
    head_ids: tuple[int, ...]
    """Token ids of everything before the first step."""
    system: str | None
    """The system prompt, which is part of `head`; None: none was given."""
    facts: VideoFacts
    ingest_s: float
    """Seconds from the request to a session that can be asked."""
    stats: IngestStats
    sampling: Sampling | None = None
    """As asked for; None: loaded from a file that does not say."""

    @property
    def head_tokens(self) -> int:
        """Prompt tokens before the first step."""
        return len(self.head_ids)

    @property
    def tokens(self) -> int:
        """Prompt tokens in the cache."""
        return self.head_tokens + self.grid.tokens

    @property
    def span(self) -> tuple[float, float]:
        """Seconds of the file at which the first frame is shown and the last one ends."""
        return self.facts.start, self.facts.end(self.stats.frames)

    @property
    def last_times(self) -> list[float]:
        """Seconds of the file at which the frames of the last step are shown."""
        frames = range((self.grid.steps - 1) * self.grid.frames_per_step, self.stats.frames)
        return [self.facts.start + index / self.facts.fps for index in frames]

    def is_visual(self) -> torch.Tensor:
        """Which of its tokens are visual, `(tokens,)`."""
        return torch.cat((torch.zeros(self.head_tokens, dtype=torch.bool, device="cpu"), self.grid.is_visual()))

    def ids(self, visual_id: int) -> list[int]:
        """Its token ids as the model's processor writes them, `visual_id` for each visual token."""
        return [*self.head_ids, *self.grid.ids(visual_id)]
