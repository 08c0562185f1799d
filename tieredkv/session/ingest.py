"""Ingests a video into a cache: decoding, vision tower and prefill run at once, each on its own thread.

No stage holds more than a segment or a chunk besides what waits in its queue, so memory does not depend on the length
of the video.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from tieredkv.cache.question import CONTEXT
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.config import TierConfig
from tieredkv.errors import TieredKVError
from tieredkv.models.chat_template import ChatTemplate
from tieredkv.models.encode import Encoded, at_processor_rate, encode, segments
from tieredkv.models.families.base import VideoGrid
from tieredkv.models.kv_shape import model_shape
from tieredkv.models.long_context import LongContext, beyond_training, trained_tokens
from tieredkv.models.same_model import SameModel
from tieredkv.models.switch import use_attention
from tieredkv.planning.admission import Request, check_memory
from tieredkv.planning.sizes import QUESTION_ROOM
from tieredkv.progress import IngestProgress
from tieredkv.session.cached_video import CachedVideo
from tieredkv.session.ingested_video import IngestedVideo, VideoFacts
from tieredkv.session.pipeline import Cancelled, Pipeline
from tieredkv.session.results import IngestStats
from tieredkv.session.video_embeddings import Prepared, VideoEmbeddings, join, prepare
from tieredkv.video.frames import open_video
from tieredkv.video.sampling import Sampling


class Ingest:
    """One video on its way into a new cache. `cancel`, from any thread, ends it."""

    def __init__(self, model: Any, template: ChatTemplate, tiers: TierConfig, show_progress: bool) -> None:
        self.model, self.template, self.tiers = model, template, tiers
        self.pipeline = Pipeline()
        self._show_progress = show_progress
        self._cache: TieredCache | None = None

    def run(self, video: Any, sampling: Sampling, question: str, max_new_tokens: int) -> CachedVideo:
        """Decode, encode and prefill the video. May be called once.

        question, max_new_tokens: what the budgets must allow for, checked before anything is decoded. Raises
        `VideoError` or `BudgetError`, and `TieredKVError` if it was cancelled; the cache's memory is then freed.
        """
        try:
            with self.pipeline:
                return self._run(video, sampling, question, max_new_tokens)
        except Cancelled:
            self.close()
            raise TieredKVError("the session was closed while its video was being ingested.") from None
        except BaseException:
            self.close()
            raise

    def cancel(self) -> None:
        """End at the next chunk, without waiting."""
        self.pipeline.cancel()

    def close(self) -> None:
        """Free the cache of an ingest that did not complete."""
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def _run(self, video: Any, sampling: Sampling, question: str, max_new_tokens: int) -> CachedVideo:
        started = time.perf_counter()
        self.pipeline.check()
        model, template = self.model, self.template
        source = open_video(video, at_processor_rate(sampling, template.processor), self.pipeline.check)
        prepared = prepare(template, model.config, source, self.tiers, sampling.max_pixels)
        head, tail = template.around_video([(question, None)])
        head_ids = template.head_ids(model.config, head, prepared.sampled)
        last = prepared.sampled.times(prepared.grid.steps - 1, prepared.grid.frames_per_step)
        question_tokens = template.tail_ids(tail, last, prepared.grid.slices).shape[1]
        room = self._check_memory(head_ids.shape[1], prepared.grid.tokens, question_tokens, max_new_tokens)
        cache = self._cache = TieredCache(self.model.config, self.tiers, prompt_tokens=room)
        same_model = SameModel(model)
        progress = IngestProgress(self._show_progress, head_ids.shape[1] + prepared.grid.tokens, source.seconds)
        complete = False
        try:
            grid, stats, sha256 = self._fill(cache, prepared, head_ids, progress)
            complete = True
        finally:
            progress.close(complete)
        same_model.check()
        cache.settle()
        ingested = IngestedVideo(
            grid=grid,
            positions=template.positions,
            head=head,
            head_ids=tuple(head_ids[0].tolist()),
            system=template.system,
            facts=VideoFacts(source.name, sha256, source.fps, source.start, source.seconds),
            ingest_s=time.perf_counter() - started,
            stats=stats,
            sampling=sampling,
        )
        return CachedVideo(model, template, cache, ingested, same_model)

    def _check_memory(self, head: int, video: int, question_tokens: int, max_new_tokens: int) -> int:
        """Refuse a video that a tier cannot hold, before the costly stages; returns the tokens to reserve on the host.

        head, video, question_tokens: tokens of the text before the video, of the video, and of the text after it.
        """
        weight = self.model.get_input_embeddings().weight
        shape = model_shape(self.model.config, weight.dtype)
        request = Request(head + video + question_tokens, question_tokens, max_new_tokens)
        LongContext(self.model.config).check(0, request.tokens + max_new_tokens)
        if beyond := beyond_training(trained_tokens(self.model.config), request.tokens):
            warnings.warn(f"the prompt has {request.tokens:,} tokens, {beyond}.", stacklevel=2)
        check_memory(shape, self.tiers, request, one_memory=weight.device.type == "cpu")
        return request.tokens + QUESTION_ROOM

    def _fill(
        self, cache: TieredCache, video: Prepared, head_ids: torch.Tensor, progress: IngestProgress
    ) -> tuple[VideoGrid, IngestStats, str]:
        """Prefill `head_ids` `(1, n)` and the video into the empty cache; returns grid, measurements and SHA-256.

        Raises what the stages raise, or `pipeline.Cancelled`; the cache is then unusable.
        """
        started = time.perf_counter()
        pipeline, frames = self.pipeline, 0

        def tick(seconds: float) -> None:
            pipeline.check()
            progress.decoded(seconds)

        def counted() -> Iterator[np.ndarray]:
            nonlocal frames
            for frame in video.source.frames(tick):
                frames += 1
                yield frame

        def reported(encoded: Iterator[Encoded]) -> Iterator[Encoded]:
            for segment in encoded:
                progress.encoded(segment.features.shape[0])
                yield segment

        hashed = pipeline.stage("hash", (source.sha256(pipeline.check) for source in [video.source]))
        decoded = pipeline.stage("decode", segments(counted(), video.segment_frames))
        encoding = encode(self.template.family, self.model, video.preprocess, decoded)
        encoded = pipeline.stage("encode", reported(encoding))
        embeddings = VideoEmbeddings(self.template, self.model, video, encoded)
        prefill(embeddings, head_ids, cache, pipeline, progress)
        grid, now = embeddings.grid, time.perf_counter()
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


@torch.no_grad()
def prefill(
    video: VideoEmbeddings, head_ids: torch.Tensor, cache: TieredCache, pipeline: Pipeline, progress: IngestProgress
) -> None:
    """Run the decoder model over the head `(1, n)` and the video, `prefill_chunk` tokens at a time."""
    template, model = video.template, video.model
    family, weight = template.family, model.get_input_embeddings().weight
    head, size = head_ids.shape[1], cache.tiers.prefill_chunk
    waiting = [family.embed(model, head_ids.to(weight.device))] if head else []
    waiting_tokens, done = head, 0
    cache.expect(CONTEXT)

    def chunk(embeddings: torch.Tensor) -> None:
        nonlocal done
        pipeline.check()
        stop = done + embeddings.shape[1]
        positions = family.positions(model, head, video.grid, done, stop, template.positions)
        family.decode(model, embeddings, positions, cache)
        progress.prefilled(embeddings.shape[1])
        done = stop

    with use_attention(model):
        for part in video:
            waiting.append(part.unsqueeze(0).to(weight.device, weight.dtype))
            waiting_tokens += part.shape[0]
            if waiting_tokens < size:
                continue
            whole = join(waiting)
            while waiting_tokens >= size:
                stop = done + size
                if template.family.whole_steps(model.config):
                    stop = video.grid.between_steps(stop - head, done - head) + head
                begin, waiting_tokens = whole.shape[1] - waiting_tokens, waiting_tokens - (stop - done)
                chunk(whole[:, begin : whole.shape[1] - waiting_tokens])
            waiting = [whole[:, whole.shape[1] - waiting_tokens :].clone()] if waiting_tokens else []
        if waiting:
            chunk(join(waiting))
