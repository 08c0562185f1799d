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

from tieredkv.attention.interface import use_attention
from tieredkv.cache import TieredCache
from tieredkv.config import TierConfig
from tieredkv.errors import VideoError
from tieredkv.models.base import Positions, VideoFamily, VideoGrid
from tieredkv.pipeline import Pipeline
from tieredkv.progress import IngestProgress
from tieredkv.stats import IngestStats
from tieredkv.video.encode import batch_tokens, encode, segments
from tieredkv.video.frames import VideoSource


@dataclass(frozen=True, slots=True)
class Prepared:
    """A video that was opened, and how it will be read; nothing of it has been decoded yet."""

    source: VideoSource
    grid: VideoGrid
    """Expected; the true one is known at the end of the video."""
    preprocess: Callable[[np.ndarray], dict[str, torch.Tensor]]
    segment_frames: int
    """Frames per call of the vision tower."""


def prepare(family: VideoFamily, config: Any, processor: Any, source: VideoSource, tiers: TierConfig) -> Prepared:
    """Settle sizes before anything is decoded. Raises `VideoError` when the processor refuses frames of this size."""
    shape = (source.expected, source.height, source.width, source.fps)
    try:
        grid = family.frame_grid(config, processor, *shape)
        preprocess = family.preprocessor(config, processor, *shape)
    except ValueError as error:
        raise VideoError(f"the model's processor refuses frames of {source.width}x{source.height}: {error}") from None
    step_frames = family.step_frames(config)
    batch = batch_tokens(config.vision_config, source.height, source.width, grid, tiers)
    steps, rows, columns = grid
    return Prepared(
        source=source,
        grid=VideoGrid(steps, rows, columns, step_frames / source.fps),
        preprocess=preprocess,
        segment_frames=batch // (rows * columns) * step_frames,
    )


def run(
    pipeline: Pipeline,
    family: VideoFamily,
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
    frames = 0

    def tick(seconds: float) -> None:
        pipeline.check()
        progress.decoded(seconds)

    def counted() -> Iterator[np.ndarray]:
        nonlocal frames
        for frame in video.source.frames(tick):
            frames += 1
            yield frame

    def announced(features: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        for part in features:
            progress.encoded(part.shape[0])
            yield part

    hashed = pipeline.stage("hash", (source.sha256(pipeline.check) for source in [video.source]))
    decoded = pipeline.stage("decode", segments(counted(), video.segment_frames))
    encoded = pipeline.stage("encode", announced(encode(family, model, video.preprocess, decoded)))
    visual = prefill(pipeline, family, model, encoded, head_ids, video.grid, rule, cache, progress)
    now = time.perf_counter()
    if visual == 0:
        raise VideoError(f"{video.source.name}: not one frame came.")
    busy, prefill_s = pipeline.busy_seconds(), now - started - pipeline.waited
    stats = IngestStats(
        frames=frames,
        visual_tokens=visual,
        decode_s=busy["decode"],
        encode_s=busy["encode"],
        prefill_s=prefill_s,
        wall_s=now - started,
        streamed_bytes=cache.transfer.streamed_bytes,
    )
    return replace(video.grid, steps=visual // video.grid.step_tokens), stats, next(hashed)


@torch.no_grad()
def prefill(
    pipeline: Pipeline,
    family: VideoFamily,
    model: Any,
    features: Iterator[torch.Tensor],
    head_ids: torch.Tensor,
    expected: VideoGrid,
    rule: Positions,
    cache: TieredCache,
    progress: IngestProgress,
) -> int:
    """Run the decoder over the head and the features, `prefill_chunk` tokens at a time; visual tokens cached."""
    weight = model.get_input_embeddings().weight
    head, size = head_ids.shape[1], cache.tiers.prefill_chunk
    waiting = [family.embed(model, head_ids.to(weight.device))] if head else []
    held, done = head, 0
    cache.text_rows = 0

    def chunk(embeddings: torch.Tensor) -> None:
        nonlocal done
        pipeline.check()
        stop = done + embeddings.shape[1]
        steps = max(expected.steps, -(-(stop - head) // expected.step_tokens))
        positions = family.positions(model, head, replace(expected, steps=steps), done, stop, rule)
        family.decode(model, embeddings, positions, cache)
        progress.prefilled(embeddings.shape[1])
        done = stop

    with use_attention(model):
        for part in features:
            waiting.append(part.unsqueeze(0).to(weight.device, weight.dtype))
            held += part.shape[0]
            if held < size:
                continue
            whole = torch.cat(waiting, dim=1)
            for start in range(0, held - size + 1, size):
                chunk(whole[:, start : start + size])
            held %= size
            waiting = [whole[:, whole.shape[1] - held :].clone()] if held else []
        if waiting:
            chunk(torch.cat(waiting, dim=1))
    return done - head
