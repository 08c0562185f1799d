"""Ingests a video into a cache: sizes and refusals first, then all stages at once."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.config import TierConfig
from tieredkv.errors import OutputError, TieredKVError
from tieredkv.models.chat_template import ChatTemplate
from tieredkv.models.encode import at_processor_rate
from tieredkv.models.kv_shape import model_shape
from tieredkv.models.long_context import LongContext
from tieredkv.models.same_model import SameModel
from tieredkv.planning.admission import Request, check_memory
from tieredkv.planning.sizes import QUESTION_ROOM, host_bytes
from tieredkv.progress import IngestProgress
from tieredkv.session import session_file
from tieredkv.session.cached_video import CachedVideo
from tieredkv.session.checkpoint import Checkpoint, Damaged
from tieredkv.session.ingested_video import IngestedVideo, VideoFacts
from tieredkv.session.pipeline import Cancelled, Pipeline
from tieredkv.session.prefill import first_steps
from tieredkv.session.results import IngestStats
from tieredkv.session.stages import Stages
from tieredkv.session.video_embeddings import prepare
from tieredkv.video.frames import VideoSource, open_video
from tieredkv.video.sampling import Sampling


class Ingest:
    """One video on its way into a new cache. `cancel`, from any thread, ends it."""

    def __init__(self, model: Any, template: ChatTemplate, tiers: TierConfig, show_progress: bool) -> None:
        self.model, self.template, self.tiers = model, template, tiers
        self.pipeline = Pipeline()
        self._show_progress = show_progress
        self._cache: TieredCache | None = None

    def run(
        self,
        video: Any,
        sampling: Sampling,
        question: str,
        max_new_tokens: int,
        checkpoint: Checkpoint | None = None,
    ) -> CachedVideo:
        """Decode, encode and prefill the video. May be called once.

        question, max_new_tokens: what the budgets must allow for, checked before anything is decoded. checkpoint: where
        what is cached is written now and then, and from which an earlier ingest is continued. Raises `VideoError`,
        `BudgetError` or `SessionError`, and `TieredKVError` if it was cancelled; the cache's memory is then freed.
        """
        try:
            with self.pipeline:
                return self._run(video, sampling, question, max_new_tokens, checkpoint)
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

    def _run(
        self, video: Any, sampling: Sampling, question: str, max_new_tokens: int, checkpoint: Checkpoint | None
    ) -> CachedVideo:
        started = time.perf_counter()
        self.pipeline.check()
        model, template = self.model, self.template
        source = open_video(video, at_processor_rate(sampling, template.processor), self.pipeline.check)
        prepared = prepare(template, model.config, source, self.tiers, sampling.max_pixels)
        head, tail = template.around_video([(question, None)])
        head_ids = template.head_ids(model.config, head, prepared.sampled)
        planned = IngestedVideo(
            grid=prepared.grid,
            positions=template.positions,
            head=head,
            head_ids=tuple(head_ids[0].tolist()),
            system=template.system,
            facts=VideoFacts(source.name, "", source.fps, source.start, source.seconds),
            ingest_s=0.0,
            stats=IngestStats.none(),
            sampling=sampling,
        )
        last = prepared.sampled.times(prepared.grid.steps - 1, prepared.grid.frames_per_step)
        question_tokens = template.tail_ids(tail, last, prepared.grid.slices).shape[1]
        room = self._check_memory(planned.head_tokens, prepared.grid.tokens, question_tokens, max_new_tokens)
        self._new_cache(room)
        same_model = SameModel(model)
        progress = IngestProgress(self._show_progress, planned.tokens, source.seconds)
        begun, complete = None, False
        try:
            if checkpoint is not None:
                begun = self._continue(checkpoint, planned, source, room, progress)
                self._check_space(checkpoint, planned.tokens, progress)
            if begun is None:
                begun = replace(planned, grid=first_steps(prepared.grid, 0))
            cache = self._held()
            stages = Stages(model, template, prepared, begun, cache, self.pipeline, progress)
            ingested = stages.run(checkpoint, same_model)
            complete = True
        finally:
            progress.close(complete)
        same_model.check()
        cache.settle()
        ingested = replace(ingested, ingest_s=begun.ingest_s + time.perf_counter() - started)
        return CachedVideo(model, template, cache, ingested, same_model)

    def _continue(
        self,
        checkpoint: Checkpoint,
        planned: IngestedVideo,
        source: VideoSource,
        room: int,
        progress: IngestProgress,
    ) -> IngestedVideo | None:
        """Fill the empty cache with what an earlier ingest has written, and return its video as far as it is cached.

        None if there is nothing, or nothing of use, which is then reported. room: as in `_new_cache`. Raises
        `SessionError` if it was another ingest than the planned one.
        """
        model, template, cache = self.model, self.template, self._held()
        try:
            begun = checkpoint.begun()
            if begun is None:
                return None
            now = replace(planned, facts=replace(planned.facts, sha256=source.sha256(self.pipeline.check)))
            checkpoint.check(begun, now, self.tiers, model, template.processor)
            progress.resumed(begun.tokens, begun.video.grid.steps * planned.grid.seconds_per_step)
            devices = dict(zip(cache.layers, session_file.layer_devices(template, model), strict=False))
            checkpoint.restore(begun, cache, devices)
        except Damaged as error:
            progress.restarted(str(error))
            checkpoint.start_over()
            self._new_cache(room)  # that one may be filled in part
            return None
        facts = replace(begun.video.facts, name=planned.facts.name)  # the file may have been moved
        return replace(begun.video, facts=facts, sampling=planned.sampling)

    def _check_space(self, checkpoint: Checkpoint, tokens: int, progress: IngestProgress) -> None:
        """Report it if the disk is too small for checkpoints of this many tokens: none is written then."""
        shape = model_shape(self.model.config, self.model.get_input_embeddings().weight.dtype)
        try:
            checkpoint.check_space(host_bytes(shape, self.tiers, tokens))
        except OutputError as error:
            progress.say(f"{error} The ingest goes on without checkpoints.")

    def _new_cache(self, room: int) -> None:
        """An empty cache, with room for this many prompt tokens."""
        self.close()
        self._cache = TieredCache(self.model.config, self.tiers, prompt_tokens=room)

    def _held(self) -> TieredCache:
        assert self._cache is not None
        return self._cache

    def _check_memory(self, head: int, video: int, question_tokens: int, max_new_tokens: int) -> int:
        """Refuse a video that a tier cannot hold, before the costly stages; returns the tokens to reserve on the host.

        head, video, question_tokens: tokens of the text before the video, of the video, and of the text after it.
        """
        weight = self.model.get_input_embeddings().weight
        shape = model_shape(self.model.config, weight.dtype)
        request = Request(head + video + question_tokens, question_tokens, max_new_tokens)
        LongContext(self.model.config).check(0, request.tokens + max_new_tokens)
        check_memory(shape, self.tiers, request, one_memory=weight.device.type == "cpu")
        return request.tokens + QUESTION_ROOM
