"""VideoSession: one video ingested once, any number of questions, each answered as if asked first."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import torch

from tieredkv.cache.looks import Looks
from tieredkv.cache.question import CONTEXT, Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.config import DEFAULT_FPS, TierConfig
from tieredkv.environment import forking
from tieredkv.errors import TieredKVError, UnsupportedModelError
from tieredkv.evidence.moments import Wanted, check_wanted
from tieredkv.memory.limits import check_host
from tieredkv.models import families
from tieredkv.models.chat_template import ChatTemplate, check_prompt
from tieredkv.models.families.base import Positions, VideoFamily, VideoGrid
from tieredkv.models.kv_shape import model_shape
from tieredkv.models.same_model import SameModel
from tieredkv.models.wrapped import unwrapped
from tieredkv.planning.admission import Request, check_memory
from tieredkv.planning.prefill_plan import question_rows
from tieredkv.planning.sizes import QUESTION_ROOM
from tieredkv.progress import IngestProgress, progress_bar
from tieredkv.session import generation, ingest, session_file
from tieredkv.session.aio import AsyncAsking
from tieredkv.session.pipeline import Cancelled, Pipeline
from tieredkv.session.question import VideoPrompt, answer, looked_at
from tieredkv.session.results import Generation, IngestStats
from tieredkv.session.session_file import SessionState
from tieredkv.session.stream import AnswerStream, Job, Work, check_stream
from tieredkv.storage.tensor_file import Stored
from tieredkv.video.frames import VideoSource, open_video


class VideoSession(AsyncAsking):
    """A video's keys and values in two tiers, and the questions asked of them.

    Owns all its state: nothing is kept on the model, so sessions on one model do not see each other. Made by
    `tieredkv.open_session` or `tieredkv.load_session`. A context manager; `close` frees both tiers. Calls from several
    threads take turns.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        tiers: TierConfig,
        positions: Positions = "published",
        progress: bool = False,
    ) -> None:
        """model, processor: as transformers loads them. The rest as in `tieredkv.open_session`."""
        model = unwrapped(model)
        device = model.get_input_embeddings().weight.device
        if device.type not in ("cpu", "cuda"):
            raise UnsupportedModelError(f"the model is on {device}: tieredkv runs on CUDA devices and the CPU.")
        self.model, self.processor, self.tiers = model, processor, tiers
        self.template = ChatTemplate(families.video_family(model.config), processor, positions)
        self.positions: Positions = positions
        self.ingest_s = 0.0
        """Seconds from the request to a session that can be asked; of a loaded session, those of its ingest."""
        self.ingest_stats: IngestStats | None = None
        self.video: VideoGrid | None = None
        self._history: list[tuple[str, str]] = []
        self._progress = progress
        self._about_video: dict[str, Any] = {}
        self._cache: TieredCache | None = None
        self._made_by: SameModel | None = None
        self._stored: Stored | None = None
        self._pipeline: Pipeline | None = None
        self._head = ""
        self._head_ids: torch.Tensor = torch.empty((1, 0), dtype=torch.long, device="cpu")
        self._lock = threading.RLock()
        self._line: deque[Job] = deque()
        self._closed = False
        self._torn = False
        """In a process that was forked while another thread was at work on the session."""
        forking.follow(self)

    # ---- ingest

    def ingest(
        self,
        video: Any,
        *,
        fps: float | None = None,
        source_fps: float | None = None,
        max_frames: int | None = None,
        start: float = 0.0,
        end: float | None = None,
        question: str = "?",
        max_new_tokens: int = 1,
    ) -> None:
        """Decode, encode and prefill the video, all at once. Once per session.

        video, fps, source_fps, max_frames, start, end: as in `tieredkv.open_session`. question, max_new_tokens: if
        what will be asked is known, it counts in the check that the budget suffices, made before anything is decoded.
        Raises `VideoError` or `BudgetError` and leaves the session without a video. `close` from another thread ends
        it with a `TieredKVError`.
        """
        with self._lock:
            self._check_open()
            if self.video is not None:
                raise TieredKVError("this session has its video already: open another session for another video.")
            started = time.perf_counter()
            rate = (getattr(self.processor.video_processor, "fps", None) or DEFAULT_FPS) if fps is None else fps
            try:
                with Pipeline() as self._pipeline:
                    if self._closed:
                        raise Cancelled
                    sampling: dict[str, Any] = {
                        "source_fps": source_fps,
                        "max_frames": max_frames,
                        "start": start,
                        "end": end,
                    }
                    source = open_video(video, rate, **sampling, check=self._pipeline.check)
                    self._ingest(self._pipeline, source, question, max_new_tokens)
            except Cancelled:
                self._drop_cache()
                raise TieredKVError("the session was closed while its video was being ingested.") from None
            except BaseException:
                self._drop_cache()
                raise
            finally:
                self._pipeline = None
            self.ingest_s = time.perf_counter() - started

    def _ingest(self, pipeline: Pipeline, source: VideoSource, question: str, max_new_tokens: int) -> None:
        config = self.model.config
        video = ingest.prepare(self.template, config, source, self.tiers)
        head, tail = self.template.around_video([(question, None)])
        self._head, self._head_ids = head, self.template.head_ids(config, head, video.sampled)
        room = self._check_memory(video.grid.tokens, self.template.tail_ids(tail).shape[1], max_new_tokens)
        cache = self._cache = TieredCache(self.model.config, self.tiers, prompt_tokens=room)
        bar = IngestProgress(self._progress, self.head_tokens + video.grid.tokens, source.seconds)
        complete = False
        made_by = SameModel(self.model)
        try:
            grid, self.ingest_stats, sha256 = ingest.run(
                pipeline, self.template, self.model, video, self._head_ids, self.positions, cache, bar
            )
            complete = True
        finally:
            bar.close(complete)
        made_by.check()
        cache.settle()
        self._about_video = {
            "name": source.name,
            "sha256": sha256,
            "fps": source.fps,
            "start": source.start,
            "seconds": source.seconds,
            "clock": "file",
        }
        self._begin_asking(cache, grid, made_by)

    def _begin_asking(self, cache: TieredCache, grid: VideoGrid, made_by: SameModel) -> None:
        """`cache` holds the prompt's head and this video."""
        self._cache, self.video, self._made_by = cache, grid, made_by

    def _check_memory(self, video: int, asked: int, max_new_tokens: int) -> int:
        """Refuse what neither tier can hold, before the costly stages; prompt tokens to make room for in the host tier.

        video, asked: tokens of the video and of the text after it.
        """
        shape = model_shape(self.model.config, self._dtype)
        tokens = self.head_tokens + video + asked
        request = Request(tokens, asked, max_new_tokens)
        check_memory(shape, self.tiers, request, one_memory=self._device.type == "cpu")
        return tokens + QUESTION_ROOM

    @property
    def _prompt(self) -> VideoPrompt:
        """What all questions share."""
        assert self.video is not None
        assert self.ingest_stats is not None
        start = self._about_video.get("start", 0.0)
        end = start + self.ingest_stats.frames / self._about_video["fps"]
        if (seconds := self._about_video["seconds"]) is not None:
            end = min(end, start + seconds)  # the last frame is shown until the next would be, or the film ends
        return VideoPrompt(self.template, self._head, self._head_ids, self.video, self.positions, start, end)

    # ---- on disk

    def save(self, path: str | Path) -> int:
        """Write the session to a file, from which `tieredkv.load_session` takes it up without the video; its bytes.

        Holds the cache of the video, the conversation so far, and what the model, the processor and the video were. An
        older file of this name is replaced at once or, if anything goes wrong, not at all. Raises `SessionError`.
        """
        with self._lock:
            cache, video = self._ready()
            assert self.ingest_stats is not None
            state = SessionState(
                grid=video,
                positions=self.positions,
                head=self._head,
                head_ids=self._head_ids.flatten().tolist(),
                video=self._about_video,
                history=self._history,
                ingest_s=self.ingest_s,
                ingest_stats=self.ingest_stats,
            )
            with progress_bar("save", "B", self._progress) as bar:
                return session_file.write(Path(path), self.model, self.processor, cache, state, bar)

    def restore(self, stored: Stored, begin: float = 0.0) -> None:
        """Resume what `save` wrote, instead of `ingest`. See `tieredkv.load_session`.

        begin: when the video's first picture is shown, from which older files count.
        """
        with self._lock:
            self._check_open()
            if self.video is not None:
                raise TieredKVError("this session has its video already: open another session for another video.")
            state = session_file.state_of(stored)
            made_by = SameModel(self.model)
            session_file.check_origin(stored, self.model, self.processor)
            cache = session_file.map_cache(stored, self.model.config, self.tiers, state.tokens, self._layer_devices())
            if self.tiers.host_kv_gb is not None:
                what = f"the cache of {state.tokens:,} tokens"
                check_host(cache.host_bytes, self.tiers.host_kv_gb, what, "raise host_kv_gb")
            self.positions, self._history = state.positions, state.history
            older = {**state.video, "start": state.video.get("start", 0.0) + begin, "clock": "file"}
            self._about_video = state.video if "clock" in state.video else older
            self.template = ChatTemplate(self.family, self.processor, state.positions)
            self._head = state.head
            self._head_ids = torch.tensor([state.head_ids], dtype=torch.long, device="cpu")
            self.ingest_s, self.ingest_stats = state.ingest_s, state.ingest_stats
            self._stored = stored
            self._begin_asking(cache, state.grid, made_by)

    # ---- questions

    @overload
    def ask(
        self,
        prompt: str,
        *,
        trace: bool = False,
        evidence: Wanted = True,
        stream: Literal[False] = False,
        **options: Any,
    ) -> Generation: ...
    @overload
    def ask(
        self, prompt: str, *, trace: bool = False, evidence: Wanted = True, stream: Literal[True], **options: Any
    ) -> AnswerStream: ...
    def ask(
        self, prompt: str, *, trace: bool = False, evidence: Wanted = True, stream: bool = False, **options: Any
    ) -> Generation | AnswerStream:
        """Answer a question about the video, as if it were the first asked.

        options: transformers' generation options (`max_new_tokens`, `do_sample`, `temperature`, `stop_strings` ...,
        `streamer`, `stopping_criteria`, `generation_config`). trace: record which chunks each step attended to.
        evidence: tell the moments of the video that were looked at; "tokens": those of every token too. stream: return
        an iterator of the text's pieces as they are made, with the answer as its `generation` at the end. Raises
        `PromptError`, `OptionError` or `BudgetError`; the session can be asked again after any of them.
        """
        work = self.asking(prompt, {**options, "trace": trace, "evidence": evidence}, stream=stream)
        return AnswerStream(work) if stream else work.run(None)

    @overload
    def chat(
        self,
        prompt: str,
        *,
        trace: bool = False,
        evidence: Wanted = True,
        stream: Literal[False] = False,
        **options: Any,
    ) -> Generation: ...
    @overload
    def chat(
        self, prompt: str, *, trace: bool = False, evidence: Wanted = True, stream: Literal[True], **options: Any
    ) -> AnswerStream: ...
    def chat(
        self, prompt: str, *, trace: bool = False, evidence: Wanted = True, stream: bool = False, **options: Any
    ) -> Generation | AnswerStream:
        """Go on with the conversation: the model sees the questions and answers of earlier `chat` calls.

        As `ask` otherwise. Earlier turns are prefilled again, exactly, like the new question; the video never is. A
        turn that fails, or is stopped before the answer is complete, leaves `history` as it was.
        """
        work = self.asking(prompt, {**options, "trace": trace, "evidence": evidence}, chat=True, stream=stream)
        return AnswerStream(work) if stream else work.run(None)

    @property
    def history(self) -> tuple[tuple[str, str], ...]:
        """Questions and answers of the conversation held with `chat`."""
        return tuple(self._history)

    def clear_history(self) -> None:
        """Begin another conversation."""
        with self._lock:
            self._history = []

    def asking(self, prompt: str, options: dict[str, Any], *, chat: bool = False, stream: bool = False) -> Work:
        """What `ask`, or `chat`, then does; raises at once what can be known before the session's turn has come.

        options: all of theirs but `stream`.
        """
        options = dict(options)
        trace, evidence = options.pop("trace", False), options.pop("evidence", True)
        with generation.ending_on_error(options.get("streamer")):
            self._check_open()
            check_stream(stream, options)
            check_wanted(evidence)
            generation.check_options(options, model_config=self.model.generation_config)
            check_prompt(prompt)
        return Work(partial(self._ask, prompt, trace, evidence, chat, options), self._line)

    def _ask(
        self, prompt: str, trace: bool, evidence: Wanted, chat: bool, options: dict[str, Any], job: Job | None
    ) -> Generation:
        if job is not None and job.streams:
            options = {**options, "streamer": job.pieces(self.template.text)}
        with generation.ending_on_error(options.get("streamer")), self._lock if job is None else job.turn(self._lock):
            cache, _ = self._ready()
            before = self._prompt
            _, tail = self.template.around_video([*(self._history if chat else ()), (prompt, None)])
            cache.truncate(before.tokens)
            try:
                tail_ids = self.template.tail_ids(tail)
                prompt_tokens = before.tokens + tail_ids.shape[1]
                question = Question(
                    max_new_tokens=self.new_tokens(options, prompt_tokens),
                    prompt_tokens=prompt_tokens,
                    rows=question_rows(self.tiers, tail_ids.shape[1]),
                    visual=before.is_visual(),
                    looks=Looks(self.tiers.chunk_tokens) if evidence else None,
                    trace=trace,
                )
                made = answer(
                    self.model,
                    before,
                    cache,
                    tail_ids,
                    question,
                    options,
                    partial(self._check_going_on, job),
                    self.ingest_s,
                )
                self._check_model()  # of a stream, whoever reads it may have changed it
                if evidence:
                    rows, count = before.question_tokens(tail, prompt), len(made.token_ids)
                    made = replace(made, evidence=looked_at(before, cache, rows, count, evidence == "tokens"))
            finally:
                cache.truncate(before.tokens)
                cache.expect(CONTEXT)
            if chat:
                self._check_going_on(job)
                self._history.append((prompt, made.text))
            return made

    def _check_going_on(self, job: Job | None) -> None:
        """Raise if a job's answer is no longer wanted; without a job somebody waits for it."""
        if job is not None:
            job.check()
            if self._closed:
                raise TieredKVError("the session was closed before the answer was complete.")

    def new_tokens(self, options: dict[str, Any], prompt_tokens: int = 0) -> int:
        """`max_new_tokens` of a question with these generation options. prompt_tokens: of its prompt, if known."""
        return generation.new_tokens(options, self.model.generation_config, prompt_tokens)

    # ---- model

    @property
    def family(self) -> VideoFamily:
        """The adapter of the model's family."""
        return self.template.family

    @property
    def _device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    def _layer_devices(self) -> list[torch.device]:
        """Where each layer computes, also where its weights come from elsewhere (accelerate's offloading)."""
        places = []
        for layer in self.family.decoder(self.model).layers:
            place = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
            places.append(next(layer.parameters()).device if place is None else torch.device(place))
        return places

    @property
    def head_tokens(self) -> int:
        """Prompt tokens before the first visual token."""
        return self._head_ids.shape[1]

    # ---- end

    def _check_open(self) -> None:
        if self._closed:
            raise TieredKVError("this session is closed: open another.")
        if self._torn:
            raise TieredKVError(
                "the process was forked while this session was at work in another thread: open or load it again here."
            )
        forking.enter(self._device.type)

    def after_fork(self) -> None:
        """Take a new lock in a forked process, where nobody is left to give the old one back."""
        self._torn = self._torn or not self._lock.acquire(blocking=False)
        if self._torn:
            self._pipeline = None
        self._lock = threading.RLock()
        self._line.clear()

    def __reduce__(self) -> Any:
        raise TieredKVError(
            "a session cannot be pickled or copied: save it, and give the other process the file for load_session."
        )

    def _ready(self) -> tuple[TieredCache, VideoGrid]:
        """The cache and the video of a session that can be asked."""
        self._check_open()
        if self.video is None or self._cache is None:
            raise TieredKVError("this session has no video yet: call ingest first.")
        if self._stored is not None:
            self._stored.check_unchanged()
        self._check_model()
        return self._cache, self.video

    def _check_model(self) -> None:
        """Raise `SessionError` if the model is not what the cache was made by."""
        assert self._made_by is not None
        self._made_by.check()

    def _drop_cache(self) -> None:
        if self._cache is not None:
            self._cache.close()
            self._cache = self._stored = None

    def stop(self) -> None:
        """Begin to close, without waiting: what `close` stops is told to stop, and nothing new begins."""
        self._closed = True
        if (pipeline := self._pipeline) is not None:
            pipeline.cancel()

    def close(self) -> None:
        """Free both tiers. Twice is fine; anything else afterwards raises.

        Stops an ingest under way in another thread, streams and what runs under asyncio, and waits for an `ask` or
        `chat` in another thread to be answered.
        """
        self.stop()
        with self._lock:
            self._drop_cache()

    def __enter__(self) -> VideoSession:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
