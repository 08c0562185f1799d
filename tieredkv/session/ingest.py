"""Ingests a video into a cache: sizes and refusals first, then all stages at once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.config import TierConfig
from tieredkv.errors import OptionError, OutputError, TieredKVError
from tieredkv.models.chat_template import ChatTemplate
from tieredkv.models.encode import at_processor_rate
from tieredkv.models.long_context import LongContext, beyond_training, trained_tokens
from tieredkv.models.placement import layer_devices
from tieredkv.models.same_model import SameModel
from tieredkv.planning.admission import Request, check_memory
from tieredkv.planning.advice import Advice
from tieredkv.planning.disk_plan import disk_plan
from tieredkv.planning.host_plan import prompt_bits
from tieredkv.planning.sizes import QUESTION_ROOM, host_bytes, stored_bytes
from tieredkv.progress import IngestProgress, Progress
from tieredkv.session import on_disk, sampled_video
from tieredkv.session.cached_video import CachedVideo
from tieredkv.session.checkpoint import Checkpoint, Damaged
from tieredkv.session.ingested_video import IngestedVideo, Place, VideoFacts
from tieredkv.session.pipeline import Cancelled, Pipeline
from tieredkv.session.prefill import first_steps
from tieredkv.session.results import IngestStats
from tieredkv.session.stages import Stages
from tieredkv.session.video_embeddings import Prepared, prepare
from tieredkv.storage import header
from tieredkv.video.frames import VideoSource
from tieredkv.video.media import check_subtitles, media_of
from tieredkv.video.sampling import Sampling
from tieredkv.video.subtitles import subtitles_hash


class Ingest:
    """One video on its way into a new cache. `cancel`, from any thread, ends it."""

    def __init__(
        self,
        model: Any,
        template: ChatTemplate,
        tiers: TierConfig,
        show_progress: bool,
        report: Progress | None = None,
        make_room: Callable[[int, int], None] | None = None,
    ) -> None:
        """report, make_room: as in `VideoSession.ingest`."""
        self.model, self.template, self.tiers = model, template, tiers
        self.pipeline = Pipeline()
        self._show_progress, self._report, self._make_room = show_progress, report, make_room
        self._cache: TieredCache | None = None
        self._folder = Path()
        """Where the cache is kept if host memory does not hold it."""

    def run(
        self,
        video: Any,
        sampling: Sampling,
        question: str,
        max_new_tokens: int,
        checkpoint: Checkpoint | None = None,
        save_to: str | Path | None = None,
    ) -> CachedVideo:
        """Decode, encode and prefill the video. May be called once.

        question, max_new_tokens: what the budgets must allow for, checked before anything is decoded. checkpoint: where
        what is cached is written now and then, and from which an earlier ingest is continued. save_to: a file whose
        disk must have room for the session. Raises `VideoError`, `BudgetError` or `SessionError`, and `TieredKVError`
        if it was cancelled; the cache's memory is then freed.
        """
        try:
            with self.pipeline:
                return self._run(video, sampling, question, max_new_tokens, checkpoint, save_to)
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
        self,
        video: Any,
        sampling: Sampling,
        question: str,
        max_new_tokens: int,
        checkpoint: Checkpoint | None,
        save_to: str | Path | None,
    ) -> CachedVideo:
        started = time.perf_counter()
        self.pipeline.check()
        given = media_of(video)
        check_subtitles(given, sampling)
        if checkpoint is not None and len(given) > 1:
            raise OptionError(f"a checkpoint is of one video: leave it out for {len(given)} videos and pictures.")
        if len(given) == 1:
            sampling = given[0].sampling(sampling)
        self._folder = on_disk.folder_for(save_to)
        model, template = self.model, self.template.showing([each.kind for each in given])
        *texts, tail = template.texts([(question, None)])
        check = self.pipeline.check
        advise = sampled_video.advice(model, template, self.tiers, texts[0], tail, max_new_tokens, self._folder)
        if sampling.fit:
            sampling = sampled_video.fitting(
                given, template.processor, sampling, advise, checkpoint, check, self._show_progress
            )
        rate = at_processor_rate(sampling, template.processor)
        media = [
            prepare(own, model.config, each.open(rate, check), self.tiers, each.sampling(rate).max_pixels)
            for own, each in zip(template.of_each(), given, strict=True)
        ]
        expected = template.context_tokens(model.config, texts, [(each.sampled, each.grid) for each in media])
        last, grid = media[-1].sampled, media[-1].grid
        after = template.tail_ids(tail, last.times(grid.steps - 1, grid.frames_per_step), grid.slices)
        advice = advise(media[0].source, sampling) if template.media == ("video",) else None
        if self._make_room is not None:
            self._make_room(self._host_bytes(expected), self._file_bytes(expected))
        room = self._check_memory(expected, after.shape[1], max_new_tokens, advice)
        if save_to is not None:
            header.check_space(Path(save_to), self._file_bytes(expected) + self._disk_bytes(expected + after.shape[1]))
        self._new_cache(room)
        same_model = SameModel(model)
        lengths = [each.source.seconds for each in media if each.source.seconds is not None]
        seconds = sum(lengths) if len(lengths) == len(media) else None
        progress = IngestProgress(self._show_progress, expected, seconds, self._report)
        whole, earlier_s, complete = None, 0.0, False
        try:
            for number, (text, prepared) in enumerate(zip(texts, media, strict=True)):
                planned, begun = self._planned(template, number, text, prepared, sampling, whole), None
                if checkpoint is not None:
                    begun = self._continue(checkpoint, planned, prepared.source, room, progress)
                    self._check_space(checkpoint, expected, progress)
                if begun is None:
                    begun = replace(planned, grid=first_steps(prepared.grid, 0))
                earlier_s += begun.ingest_s
                place = Place() if whole is None else whole.end(model, template)
                stages = Stages(model, prepared, begun, self._held(), self.pipeline, progress, place)
                part = stages.run(checkpoint, same_model)
                whole = part if whole is None else whole.followed_by(part, place)
                progress.passed(prepared.source.seconds or 0.0)
            complete = True
        finally:
            progress.close(complete)
        same_model.check()
        self._held().settle()
        assert whole is not None
        ingested = replace(whole, ingest_s=earlier_s + time.perf_counter() - started)
        return CachedVideo(model, template, self._held(), ingested, same_model)

    def _planned(
        self,
        template: ChatTemplate,
        number: int,
        text: str,
        video: Prepared,
        sampling: Sampling,
        earlier: IngestedVideo | None,
    ) -> IngestedVideo:
        """The `number`-th video as it will be, as if it were alone. text: of the prompt before it. earlier: the videos
        before it."""
        before = ((), None) if earlier is None else (earlier.last.last_times, earlier.last.grid.slices)
        source = video.source
        return IngestedVideo(
            grid=video.grid,
            positions=template.positions,
            head=text,
            head_ids=tuple(template.text_ids(self.model.config, number, text, video.sampled, before)[0].tolist()),
            facts=VideoFacts(
                source.name, "", source.fps, source.start, source.seconds, subtitles_hash(video.sampled.cues)
            ),
            ingest_s=0.0,
            stats=IngestStats.none(),
            sampling=sampling,
            system=template.system,
            kind=template.media[number],
        )

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
            devices = dict(zip(cache.layers, layer_devices(template.family.decoder(model).layers), strict=False))
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
        try:
            checkpoint.check_space(self._file_bytes(tokens))
        except OutputError as error:
            progress.say(f"{error} The ingest goes on without checkpoints.")

    def _new_cache(self, room: int) -> None:
        """An empty cache, with room for this many prompt tokens."""
        self.close()
        disk = on_disk.new_tier(self.model, self.tiers, room - QUESTION_ROOM, self._folder)
        self._cache = TieredCache(self.model.config, self.tiers, prompt_tokens=room, disk=disk)

    def _held(self) -> TieredCache:
        assert self._cache is not None
        return self._cache

    def _file_bytes(self, tokens: int) -> int:
        """Size of the session file of this many tokens, without its header: it holds what the host tier does."""
        shape = on_disk.shape_of(self.model)
        return stored_bytes(shape, self.tiers, tokens, prompt_bits(shape, self.tiers, tokens))

    def _host_bytes(self, tokens: int) -> int:
        """Host memory of a cache of this many tokens."""
        shape = on_disk.shape_of(self.model)
        bits = prompt_bits(shape, self.tiers, tokens)
        plan = disk_plan(shape, self.tiers, tokens, bits)
        return host_bytes(shape, self.tiers, tokens, bits) if plan is None else plan.host_bytes

    def _disk_bytes(self, tokens: int) -> int:
        """What a cache of so many tokens takes of the disk while there is no session file."""
        shape = on_disk.shape_of(self.model)
        plan = disk_plan(shape, self.tiers, tokens, prompt_bits(shape, self.tiers, tokens))
        return 0 if plan is None else plan.disk_bytes

    def _check_memory(self, context: int, question_tokens: int, max_new_tokens: int, advice: Advice | None) -> int:
        """Refuse videos that a tier cannot hold, before the costly stages; returns the tokens to reserve on the host.

        context, question_tokens: tokens up to the end of the last video, and of the text after it.
        advice: on the video, if there is one.
        """
        shape, device = on_disk.shape_of(self.model), self.model.get_input_embeddings().weight.device
        request = Request(context + question_tokens, question_tokens, max_new_tokens)
        LongContext(self.model.config).check(0, request.tokens + max_new_tokens)
        if beyond := beyond_training(trained_tokens(self.model.config), request.tokens):
            warnings.warn(f"the prompt has {request.tokens:,} tokens, {beyond}.", stacklevel=2)
        if advice is None:
            check_memory(shape, self.tiers, request, one_memory=device.type == "cpu", folder=self._folder)
        else:
            advice.check(request)
        return request.tokens + QUESTION_ROOM
