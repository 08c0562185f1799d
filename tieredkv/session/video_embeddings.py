"""The decoder model's input for a video: features of the vision tower, in some families with text between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tieredkv.config import TierConfig
from tieredkv.errors import UnsupportedModelError, VideoError
from tieredkv.models.chat_template import ChatTemplate, refused
from tieredkv.models.encode import Encoded, batch_tokens
from tieredkv.models.families.base import VideoGrid
from tieredkv.video.frames import Sampled, VideoSource


@dataclass(frozen=True, slots=True)
class Prepared:
    """An opened video and how it will be read. Nothing has been decoded yet."""

    template: ChatTemplate
    """By which its tokens are counted."""
    source: VideoSource
    sampled: Sampled
    grid: VideoGrid
    """Expected; the true one is known at the end of the video."""
    preprocess: Callable[[np.ndarray], dict[str, torch.Tensor]]
    segment_frames: int
    """Frames per call of the vision tower."""


def prepare(
    template: ChatTemplate, config: Any, source: VideoSource, tiers: TierConfig, max_pixels: int | None = None
) -> Prepared:
    """Determine sizes before anything is decoded. max_pixels: as in `Sampling`.

    Raises `VideoError` if the processor refuses frames of this size, and `OptionError` if it cannot make them so small.
    """
    family, video = template.family, Sampled.of(source, max_pixels)
    grid = template.grid(config, video)
    try:
        preprocess = family.preprocessor(config, template.processor, video)
    except ValueError as error:
        raise refused(video, error) from None
    batch = batch_tokens(family, config, video, grid, tiers)
    return Prepared(
        template=template,
        source=source,
        sampled=video,
        grid=grid,
        preprocess=preprocess,
        segment_frames=batch // grid.step_tokens * family.step_frames(config),
    )


class VideoEmbeddings:
    """Iterator of embeddings `(n, width)`, segment by segment, and finally those that close the video.

    `grid` describes the steps yielded so far.
    """

    def __init__(
        self, template: ChatTemplate, model: Any, video: Prepared, grid: VideoGrid, encoded: Iterator[Encoded]
    ) -> None:
        """grid: the steps before the first segment. encoded: each segment, as from `models.encode.encode`."""
        self.template, self.model, self.grid = template, model, grid
        self._video, self._encoded = video, encoded
        self._step_frames = template.family.step_frames(model.config)
        self.frames = grid.steps * self._step_frames
        """Frames in the segments yielded and before."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        for segment in self._encoded:
            self.frames += segment.frames
            yield self._segment(segment, self.frames)
        if self.grid.steps == 0:
            raise VideoError(f"{self._video.source.name}: no frame could be decoded.")
        closing = self.template.family.closing(self.model)
        if closing is not None:
            self.grid = replace(self.grid, closing=closing.shape[0])
            yield closing.detach()

    def _segment(self, segment: Encoded, frames: int) -> torch.Tensor:
        """Add a segment's steps to the grid; their features with the text between them. frames: of the video so far."""
        features, steps = segment.features, -(-segment.frames // self._step_frames)
        lengths = segment.lengths or (self.grid.step_tokens,) * steps
        if features.shape[0] != sum(lengths) or len(lengths) != steps:
            raise UnsupportedModelError(
                f"the vision tower returned {features.shape[0]} tokens for {steps} steps of {self.grid.step_tokens}: "
                "the processor is not the model's own."
            )
        first = self.grid.steps
        sampled, template = self._video.sampled, self.template

        def times(step: int) -> list[float]:
            return sampled.times(step, self._step_frames, frames)

        texts = [
            template.between_ids(step, times, self.grid.slices, sampled.cues_of(step, self._step_frames))
            for step in range(first, first + steps)
        ]
        self.grid = replace(
            self.grid, steps=first + steps, lengths=self.grid.lengths + lengths if segment.lengths else ()
        )
        if texts[0] is None:
            return features
        between = tuple(ids or () for ids in texts)
        self.grid = replace(self.grid, between=self.grid.between + between)
        weight, slices = self.model.get_input_embeddings().weight, self.grid.slices

        def text(ids: tuple[int, ...]) -> torch.Tensor:
            tokens = torch.tensor([ids], dtype=torch.long, device=weight.device)
            return template.family.embed(self.model, tokens)

        inside = [] if slices is None else [text(ids) for ids in slices.before]
        parts = []
        for ids, step, length in zip(between, features.split(lengths), lengths, strict=True):
            tiles = [] if slices is None else [slices.height * slices.width] * len(slices.before)
            pictures = step.unsqueeze(0).to(weight.device, weight.dtype).split([length - sum(tiles), *tiles], dim=1)
            for words, picture in zip((text(ids), *inside), pictures, strict=True):
                parts += [words, picture]
        return join(parts)[0]


def join(parts: list[torch.Tensor]) -> torch.Tensor:
    """Embeddings `(1, n, width)` one after another; narrower ones, of text or of pictures, padded with zeros."""
    width = max(part.shape[2] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[2])) for part in parts], dim=1)
