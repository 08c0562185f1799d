"""A video into a cache: decoding, the vision tower and prefill at once, each ahead of the next on its own thread.

No stage holds more than a segment or a chunk besides what waits in its queue, so the memory it takes does not depend on
the length of the video.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tieredkv.cache.question import CONTEXT
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.config import TierConfig
from tieredkv.errors import UnsupportedModelError, VideoError
from tieredkv.models.chat_template import ChatTemplate, refused
from tieredkv.models.encode import batch_tokens, encode, segments
from tieredkv.models.families.base import Positions, VideoFamily, VideoGrid
from tieredkv.models.switch import use_attention
from tieredkv.planning.prefill_plan import context_calls
from tieredkv.progress import IngestProgress
from tieredkv.session.pipeline import Pipeline
from tieredkv.session.results import IngestStats
from tieredkv.video.frames import Sampled, VideoSource


@dataclass(frozen=True, slots=True)
class Prepared:
    """A video that was opened, and how it will be read; nothing of it has been decoded yet."""

    source: VideoSource
    sampled: Sampled
    grid: VideoGrid
    """Expected; the true one is known at the end of the video."""
    preprocess: Callable[[np.ndarray], dict[str, torch.Tensor]]
    segment_frames: int
    """Frames per call of the vision tower."""


def prepare(template: ChatTemplate, config: Any, source: VideoSource, tiers: TierConfig) -> Prepared:
    """Settle sizes before anything is decoded. Raises `VideoError` when the processor refuses frames of this size."""
    family, video = template.family, Sampled.of(source)
    grid = template.grid(config, video)
    try:
        preprocess = family.preprocessor(config, template.processor, video.frames, video.height, video.width, video.fps)
    except ValueError as error:
        raise refused(video, error) from None
    batch = batch_tokens(family, config, video.height, video.width, grid, tiers)
    return Prepared(
        source=source,
        sampled=video,
        grid=grid,
        preprocess=preprocess,
        segment_frames=batch // grid.step_tokens * family.step_frames(config),
    )


def run(
    pipeline: Pipeline,
    template: ChatTemplate,
    model: Any,
    video: Prepared,
    head_ids: torch.Tensor,
    rule: Positions,
    cache: TieredCache,
    progress: IngestProgress,
) -> tuple[VideoGrid, IngestStats, str]:
    """Prefill `head_ids` `(1, n)` and the video into an empty cache; its true grid, what was measured, its SHA-256.

    Raises what the stages raise, or `pipeline.Cancelled`; the cache is then of no use.
    """
    started = time.perf_counter()
    family, frames = template.family, 0

    def tick(seconds: float) -> None:
        pipeline.check()
        progress.decoded(seconds)

    def counted() -> Iterator[np.ndarray]:
        nonlocal frames
        for frame in video.source.frames(tick):
            frames += 1
            yield frame

    def announced(features: Iterator[tuple[torch.Tensor, int]]) -> Iterator[tuple[torch.Tensor, int]]:
        for part, count in features:
            progress.encoded(part.shape[0])
            yield part, count

    hashed = pipeline.stage("hash", (source.sha256(pipeline.check) for source in [video.source]))
    decoded = pipeline.stage("decode", segments(counted(), video.segment_frames))
    encoded = pipeline.stage("encode", announced(encode(family, model, video.preprocess, decoded)))
    steps = Steps(template, model, video)
    prefill(pipeline, family, model, steps.embeddings(encoded), head_ids, steps, rule, cache, progress)
    grid, now = steps.grid, time.perf_counter()
    busy, prefill_s = pipeline.busy_seconds(), now - started - pipeline.waited
    stats = IngestStats(
        frames=frames,
        visual_tokens=grid.visual_tokens,
        decode_s=busy["decode"],
        encode_s=busy["encode"],
        prefill_s=prefill_s,
        wall_s=now - started,
        streamed_bytes=cache.device_tier.transfer.streamed_bytes,
    )
    return grid, stats, next(hashed)


class Steps:
    """The steps of a video as they come, with the text between them: what the decoder reads, and its grid so far."""

    def __init__(self, template: ChatTemplate, model: Any, video: Prepared) -> None:
        self._template, self._model, self._video = template, model, video
        self._step_frames = template.family.step_frames(model.config)
        self.grid = replace(video.grid, steps=0, between=(), closing=0)

    def embeddings(self, encoded: Iterator[tuple[torch.Tensor, int]]) -> Iterator[torch.Tensor]:
        """Embeddings `(n, width)` of segment after segment, and of what closes the video."""
        frames = 0
        for features, count in encoded:
            frames += count
            yield self._segment(features, -(-count // self._step_frames), frames)
        if self.grid.steps == 0:
            raise VideoError(f"{self._video.source.name}: not one frame came.")
        end = self._template.family.closing(self._model)
        if end is not None:
            self.grid = replace(self.grid, closing=end.shape[0])
            yield end.detach()

    def _segment(self, features: torch.Tensor, steps: int, frames: int) -> torch.Tensor:
        """Note `steps` further steps, with which there are `frames` frames; their features with the text between."""
        if features.shape[0] != steps * self.grid.step_tokens:
            raise UnsupportedModelError(
                f"the vision tower made {features.shape[0]} tokens of {steps} steps of {self.grid.step_tokens}: "
                "the processor beside the model is not the model's own."
            )
        first = self.grid.steps
        sampled, template = self._video.sampled, self._template
        texts = [
            template.between_ids(step, sampled.times(step, self._step_frames, frames))
            for step in range(first, first + steps)
        ]
        if texts[0] is None:
            self.grid = replace(self.grid, steps=first + steps)
            return features
        between = tuple(ids or () for ids in texts)
        self.grid = replace(self.grid, steps=first + steps, between=self.grid.between + between)
        weight = self._model.get_input_embeddings().weight
        parts = []
        for ids, part in zip(between, features.split(self.grid.step_tokens), strict=True):
            text = torch.tensor([ids], dtype=torch.long, device=weight.device)
            parts += [template.family.embed(self._model, text), part.unsqueeze(0).to(weight.device, weight.dtype)]
        return join(parts)[0]


def join(parts: list[torch.Tensor]) -> torch.Tensor:
    """Embeddings `(1, n, width)` behind one another; narrower ones, which are text, padded with zeros."""
    width = max(part.shape[2] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[2])) for part in parts], dim=1)


@torch.no_grad()
def prefill(
    pipeline: Pipeline,
    family: VideoFamily,
    model: Any,
    embeddings: Iterator[torch.Tensor],
    head_ids: torch.Tensor,
    steps: Steps,
    rule: Positions,
    cache: TieredCache,
    progress: IngestProgress,
) -> None:
    """Run the decoder over the head and the video's embeddings `(n, width)`, `prefill_chunk` tokens at a time."""
    weight = model.get_input_embeddings().weight
    head, size = head_ids.shape[1], cache.tiers.prefill_chunk
    waiting = [family.embed(model, head_ids.to(weight.device))] if head else []
    held, done = head, 0
    cache.expect(CONTEXT)

    def chunk(embeddings: torch.Tensor) -> None:
        nonlocal done
        pipeline.check()
        stop = done + embeddings.shape[1]
        positions = family.positions(model, head, steps.grid, done, stop, rule)
        family.decode(model, embeddings, positions, cache)
        progress.prefilled(embeddings.shape[1])
        done = stop

    with use_attention(model):
        for part in embeddings:
            waiting.append(part.unsqueeze(0).to(weight.device, weight.dtype))
            held += part.shape[0]
            if held < size:
                continue
            whole = join(waiting)
            for call in context_calls(held - held % size, size):
                chunk(whole[:, call.begin : call.stop])
            held %= size
            waiting = [whole[:, whole.shape[1] - held :].clone()] if held else []
        if waiting:
            chunk(join(waiting))
