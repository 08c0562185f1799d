"""Ingests a video into a cache: decoding, vision tower and prefill run at once, each on its own thread.

No stage holds more than a segment or a chunk besides what waits in its queue, so memory does not depend on the length
of the video.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tieredkv.cache.question import CONTEXT
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.config import TierConfig
from tieredkv.errors import TieredKVError
from tieredkv.models.chat_template import ChatTemplate
from tieredkv.models.encode import Encoded, at_processor_rate, encode, segments
from tieredkv.models.families.base import Slices
from tieredkv.models.kv_shape import model_shape
from tieredkv.models.long_context import LongContext
from tieredkv.models.same_model import SameModel
from tieredkv.models.switch import use_attention
from tieredkv.planning.admission import Request, check_memory
from tieredkv.planning.sizes import QUESTION_ROOM
from tieredkv.progress import IngestProgress
from tieredkv.session.cached_video import CachedVideo
from tieredkv.session.ingested_video import IngestedVideo, Medium, VideoFacts
from tieredkv.session.pipeline import Cancelled, Pipeline
from tieredkv.session.results import IngestStats
from tieredkv.session.video_embeddings import Prepared, VideoEmbeddings, join, prepare
from tieredkv.video.media import media_of
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
        given = media_of(video)
        model, template = self.model, self.template.showing([each.kind for each in given])
        *texts, tail = template.texts([(question, None)])
        rate, check = at_processor_rate(sampling, template.processor), self.pipeline.check
        media = [
            prepare(own, model.config, each.open(rate, check), self.tiers, each.sampling(rate).max_pixels)
            for own, each in zip(template.of_each(), given, strict=True)
        ]
        expected, question_tokens = _expected(template, model.config, texts, tail, media)
        room = self._check_memory(expected, question_tokens, max_new_tokens)
        cache = self._cache = TieredCache(self.model.config, self.tiers, prompt_tokens=room)
        same_model = SameModel(model)
        lengths = [each.source.seconds for each in media if each.source.seconds is not None]
        progress = IngestProgress(self._show_progress, expected, sum(lengths) if len(lengths) == len(media) else None)
        filled: list[Medium] = []
        measured: list[IngestStats] = []
        complete = False
        try:
            for number, prepared in enumerate(media):
                medium, stats = self._fill(cache, template, number, texts[number], prepared, filled, progress)
                filled.append(medium)
                measured.append(stats)
            complete = True
        finally:
            progress.close(complete)
        same_model.check()
        cache.settle()
        first, *more = filled
        ingested = IngestedVideo(
            grid=first.grid,
            positions=template.positions,
            head=texts[0],
            head_ids=first.text_ids,
            system=template.system,
            facts=first.facts,
            ingest_s=time.perf_counter() - started,
            stats=IngestStats.total(measured),
            sampling=sampling,
            kind=first.kind,
            more=tuple(more),
        )
        return CachedVideo(model, template, cache, ingested, same_model)

    def _check_memory(self, context: int, question_tokens: int, max_new_tokens: int) -> int:
        """Refuse videos that a tier cannot hold, before the costly stages; returns the tokens to reserve on the host.

        context, question_tokens: tokens up to the end of the last video, and of the text after it.
        """
        weight = self.model.get_input_embeddings().weight
        shape = model_shape(self.model.config, weight.dtype)
        request = Request(context + question_tokens, question_tokens, max_new_tokens)
        LongContext(self.model.config).check(0, request.tokens + max_new_tokens)
        check_memory(shape, self.tiers, request, one_memory=weight.device.type == "cpu")
        return request.tokens + QUESTION_ROOM

    def _fill(
        self,
        cache: TieredCache,
        template: ChatTemplate,
        number: int,
        text: str,
        video: Prepared,
        earlier: Sequence[Medium],
        progress: IngestProgress,
    ) -> tuple[Medium, IngestStats]:
        """Prefill the `number`-th video and the text before it, after `earlier` ones; returns it, and measurements.

        Raises what the stages raise, or `pipeline.Cancelled`; the cache is then unusable.
        """
        started, waited = time.perf_counter(), self.pipeline.waited
        pipeline, frames, own = self.pipeline, 0, video.template
        streamed = cache.device_tier.transfer.streamed_bytes
        before = (earlier[-1].last_times, earlier[-1].grid.slices) if earlier else ((), None)
        text_ids = template.text_ids(self.model.config, number, text, video.sampled, before)
        shift, passed = _shift(template, self.model, earlier), sum(each.facts.seconds or 0.0 for each in earlier)

        def tick(seconds: float) -> None:
            pipeline.check()
            progress.decoded(passed + seconds)

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
        encoding = encode(own.family, self.model, video.preprocess, decoded)
        encoded = pipeline.stage("encode", reported(encoding))
        embeddings = VideoEmbeddings(own, self.model, video, encoded)
        prefill(embeddings, text_ids, cache, pipeline, progress, shift)
        grid, now = embeddings.grid, time.perf_counter()
        busy, prefill_s = pipeline.busy_seconds(), now - started - (pipeline.waited - waited)
        stats = IngestStats(
            frames=frames,
            visual_tokens=grid.visual_tokens,
            decode_s=busy["decode"],
            encode_s=busy["encode"],
            prefill_s=prefill_s,
            wall_s=now - started,
            streamed_bytes=cache.device_tier.transfer.streamed_bytes - streamed,
        )
        source = video.source
        facts = VideoFacts(source.name, next(hashed), source.fps, source.start, source.seconds)
        return Medium(template.media[number], tuple(text_ids[0].tolist()), grid, facts, frames, shift), stats


def _expected(
    template: ChatTemplate, config: Any, texts: Sequence[str], tail: str, media: Sequence[Prepared]
) -> tuple[int, int]:
    """Tokens up to the end of the last medium, and of the text after it, as far as is known before decoding."""
    tokens = 0
    before: tuple[Sequence[float], Slices | None] = ((), None)
    for number, (text, video) in enumerate(zip(texts, media, strict=True)):
        tokens += template.text_ids(config, number, text, video.sampled, before).shape[1] + video.grid.tokens
        before = video.sampled.times(video.grid.steps - 1, video.grid.frames_per_step), video.grid.slices
    return tokens, template.tail_ids(tail, *before).shape[1]


def _shift(template: ChatTemplate, model: Any, earlier: Sequence[Medium]) -> int:
    """`shift` of the medium after `earlier` ones: the position of the first token after them."""
    if not earlier:
        return 0
    last, family = earlier[-1], template.families[len(earlier) - 1]
    return int(last.positions(family, model, last.tokens, last.tokens + 1, template.positions)[0, 0])


@torch.no_grad()
def prefill(
    video: VideoEmbeddings,
    head_ids: torch.Tensor,
    cache: TieredCache,
    pipeline: Pipeline,
    progress: IngestProgress,
    shift: int,
) -> None:
    """Run the decoder model over the text `(1, n)` before the video and the video, `prefill_chunk` tokens at a time.

    shift: `Medium.shift`.
    """
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
        positions = family.positions(model, head, video.grid, done, stop, template.positions) + shift
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
