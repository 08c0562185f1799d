"""The stages of an ingest: hashing, decoding, the vision tower and prefill at once, each on its own thread.

No stage holds more than a segment or a chunk besides what waits in its queue, so memory does not depend on the length
of the video.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.errors import TieredKVError
from tieredkv.models.encode import Encoded, encode, segments
from tieredkv.models.same_model import SameModel
from tieredkv.progress import IngestProgress
from tieredkv.session.checkpoint import Checkpoint
from tieredkv.session.ingested_video import IngestedVideo, Place
from tieredkv.session.pipeline import Pipeline
from tieredkv.session.prefill import cached_steps, first_steps, prefill
from tieredkv.session.results import IngestStats
from tieredkv.session.video_embeddings import Prepared, VideoEmbeddings


class Stages:
    """Fill a cache with a video, from its beginning or from where an earlier ingest has stopped."""

    def __init__(
        self,
        model: Any,
        video: Prepared,
        begun: IngestedVideo,
        cache: TieredCache,
        pipeline: Pipeline,
        progress: IngestProgress,
        place: Place,
    ) -> None:
        """begun: the video as far as it is cached; no step, if nothing is. place: where it begins in the prompt, which
        is not at the beginning if the cache holds other videos."""
        self._model, self._template, self._video, self._begun = model, video.template, video, begun
        self._place, self._waited = place, pipeline.waited
        self._streamed = cache.device_tier.streamed_bytes
        self._cache, self._pipeline, self._progress = cache, pipeline, progress
        self._sha256 = begun.facts.sha256
        self._started = time.perf_counter()
        self._steps_at_once = video.segment_frames // video.grid.frames_per_step
        cached = max(0, cache.get_seq_length() - place.tokens - begun.head_tokens)
        self._grid = cached_steps(begun.grid, cached, self._steps_at_once)
        """The steps of segments that are not encoded again."""
        self._embeddings: VideoEmbeddings

    def run(self, checkpoint: Checkpoint | None, same_model: SameModel) -> IngestedVideo:
        """Prefill what is not cached; returns the whole video, without the time that its session takes.

        Raises what the stages raise, or `pipeline.Cancelled`; the cache is then unusable, and what it held between two
        calls is in the checkpoint if that took little time.
        """
        pipeline, family = self._pipeline, self._template.family
        hashed = pipeline.stage("hash", self._hash())
        decoded = pipeline.stage("decode", segments(self._frames(), self._video.segment_frames))
        encoding = encode(family, self._model, self._video.preprocess, self._after_cached(decoded))
        encoded = pipeline.stage("encode", self._reported(encoding))
        self._embeddings = VideoEmbeddings(self._template, self._model, self._video, self._grid, encoded)
        head_ids = torch.tensor([self._begun.head_ids], dtype=torch.long, device="cpu")

        def after_call(tokens: int) -> None:
            self._progress.prefilled(tokens)
            if checkpoint is not None and self._sha256 and checkpoint.is_due(self._cache):
                self._write(checkpoint, same_model)

        try:
            prefill(self._embeddings, head_ids, self._cache, pipeline.check, after_call, self._place)
        except BaseException:
            if checkpoint is not None and checkpoint.is_cheap(self._cache):
                with suppress(Exception):  # it raises in the middle of a call; the other error is the one to report
                    self._write(checkpoint, same_model)
            raise
        next(hashed)
        embeddings = self._embeddings
        return self._cached(embeddings.grid, embeddings.frames)

    def _write(self, checkpoint: Checkpoint, same_model: SameModel) -> None:
        """Write a checkpoint. A disk that fails is reported, and the ingest goes on without."""
        embeddings, head = self._embeddings, self._begun.head_tokens
        whole = first_steps(embeddings.grid, embeddings.frames // embeddings.grid.frames_per_step)
        grid = cached_steps(whole, self._cache.get_seq_length() - head, self._steps_at_once)
        same_model.check()
        video = self._cached(grid, grid.steps * grid.frames_per_step)
        try:
            checkpoint.write(self._cache, video, self._model, self._template.processor)
        except (TieredKVError, OSError) as error:
            self._progress.say(f"{error} The ingest goes on without checkpoints.")

    def _cached(self, grid: Any, frames: int) -> IngestedVideo:
        """The video up to now: its steps, frames and measurements, with those of the ingest before."""
        earlier, now = self._begun.stats, time.perf_counter()
        busy, wall_s = self._pipeline.busy_seconds(), now - self._started
        stats = IngestStats(
            frames=frames,
            visual_tokens=grid.visual_tokens,
            decode_s=earlier.decode_s + busy["decode"],
            encode_s=earlier.encode_s + busy["encode"],
            prefill_s=earlier.prefill_s + wall_s - (self._pipeline.waited - self._waited),
            wall_s=earlier.wall_s + wall_s,
            streamed_bytes=earlier.streamed_bytes + self._cache.device_tier.streamed_bytes - self._streamed,
            damaged=self._video.source.damaged,
        )
        facts = replace(self._begun.facts, sha256=self._sha256)
        return replace(self._begun, grid=grid, facts=facts, stats=stats, ingest_s=self._begun.ingest_s + wall_s)

    # ---- stages

    def _hash(self) -> Iterator[None]:
        self._sha256 = self._sha256 or self._video.source.sha256(self._pipeline.check)
        yield

    def _frames(self) -> Iterator[np.ndarray]:
        """From the segment before the first that is not cached on."""

        def tick(seconds: float) -> None:
            self._pipeline.check()
            self._progress.decoded(seconds)

        first = self._grid.steps * self._grid.frames_per_step
        yield from self._video.source.frames(tick, max(0, first - self._video.segment_frames))

    def _after_cached(self, decoded: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The segments that are not cached. A family may compare a segment with the one before."""
        if self._grid.steps:
            self._video.preprocess(next(decoded))
        yield from decoded

    def _reported(self, encoded: Iterator[Encoded]) -> Iterator[Encoded]:
        for segment in encoded:
            self._progress.encoded(segment.features.shape[0])
            yield segment
