"""ModelEngine: one worker owns the model, and serves one request after another."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tieredkv.api import check_question
from tieredkv.config import tier_config
from tieredkv.errors import SessionError, TieredKVError
from tieredkv.evidence.target import check_wanted
from tieredkv.memory.limits import host_budget_bytes
from tieredkv.memory.units import GIB
from tieredkv.models.prompts import check_system
from tieredkv.models.timestamps import check_timestamps
from tieredkv.serve.asked import Answer, Asked, Piece, Progress, Ready, Shown, Token
from tieredkv.serve.engine.files import SessionFiles
from tieredkv.serve.engine.key import Keys
from tieredkv.serve.engine.line import Line
from tieredkv.serve.engine.opening import Opening, Wanted
from tieredkv.serve.engine.request import Request
from tieredkv.serve.engine.sessions import OpenSession, Sessions
from tieredkv.serve.engine.state import Counts, EngineState
from tieredkv.serve.errors import ApiError
from tieredkv.serve.settings import Settings
from tieredkv.session.aio import AsyncAnswerStream
from tieredkv.session.default_cap import with_default_cap
from tieredkv.session.origin import BUNDLED, ModelSource
from tieredkv.session.results import Generation
from tieredkv.session.text_streamer import token_texts
from tieredkv.session.video_session import VideoSession

log = logging.getLogger(__name__)

NEWS_S = 1.0
"""Seconds without an event after which a request is told again where it is."""


@dataclass(slots=True)
class _Coming:
    """A session that is being opened."""

    key: str
    opening: Opening
    progress: tuple[Any, int, int | None] = ("load", 0, None)
    """Stage, tokens that are cached, and how many are expected."""


class ModelEngine:
    """An `Engine` (see `tieredkv.serve.asked`) of one loaded model. `start` before the first request, `stop` at the
    end."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        settings: Settings,
        source: Callable[[Shown], Any],
    ) -> None:
        """model, processor: as `tieredkv.models.loading.load` returns them for `settings`. source: gives a film to
        `VideoSession.ingest`, on another thread.

        Raises `TieredKVError` for settings that do not work. Takes as long as summing the weights.
        """
        self._model, self._processor, self._settings, self._source = model, processor, settings, source
        self._origin = ModelSource.of(settings.model or model, settings.weights)
        self.model_name = _name_of(self._origin)
        self.created = int(time.time())
        self.observers: list[Callable[[Generation], None]] = []
        """Called with each complete answer."""
        tiers, self._cap = tier_config(None, settings.tiers), None
        self._cap_is_default = settings.tiers.get("gpu_kv_gb") is None
        if self._cap_is_default:
            tiers, self._cap = with_default_cap(model, tiers)
        self._tiers = tiers
        self._keys = Keys(model, processor, tiers)
        folder = settings.sessions
        files = None if folder is None else SessionFiles(folder, int(settings.sessions_gb * GIB))
        host_gb = tiers.host_kv_gb if settings.open_gb is None else settings.open_gb
        self._sessions = Sessions(host_budget_bytes(host_gb), files)
        self._counts = Counts()
        self._line: Line[Request] = Line(settings.queue)
        self._running: Request | None = None
        self._coming: _Coming | None = None
        """The session that is being opened."""
        self._wanted: dict[str, set[Request]] = {}
        """Requests that have not ended, by the key of their session."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tieredkv-opening")
        self._worker: asyncio.Task[None] | None = None
        self._stopping = False

    # ---- beginning and end

    async def start(self) -> None:
        """Begin to serve."""
        self._worker = asyncio.create_task(self._work(), name="tieredkv-engine")

    async def stop(self, grace: float) -> None:
        """Refuse new requests and those that wait; what runs may go on for `grace` seconds. Frees all memory."""
        self._stopping = True
        for request in self._line.clear():
            self._counts.refused += 1
            request.end(_shutting_down())
        if (worker := self._worker) is not None:
            if self._running is None:
                worker.cancel()
            elif not (await asyncio.wait({worker}, timeout=grace))[0]:
                self._running.end(_shutting_down())
            await asyncio.gather(worker, return_exceptions=True)
        self._thread.shutdown()
        self._sessions.close()

    def snapshot(self) -> EngineState:
        """What it has done and holds now."""
        running = self._running is not None
        tiers = self._sessions.tiers(self._tiers.cap_bytes)
        return EngineState(len(self._line), int(running), self._stopping, replace(self._counts), **tiers)

    # ---- requests

    def ask(self, asked: Asked) -> AsyncGenerator[Progress | Piece | Answer, None]:
        """See `Engine.ask`."""
        return self._events(asked, prepares=False)

    def prepare(self, asked: Asked) -> AsyncGenerator[Progress | Ready, None]:
        """See `Engine.prepare`."""
        return self._events(asked, prepares=True)

    async def _events(self, asked: Asked, prepares: bool) -> AsyncGenerator[Any, None]:
        request = self._join(asked, prepares)
        deadline = request.arrived + self._settings.timeout - time.monotonic()
        timer = asyncio.get_running_loop().call_later(deadline, self._time_out, request)
        try:
            while True:
                event = await request.next(NEWS_S)
                if event is not None:
                    yield event
                elif request.ended:
                    return
                else:
                    self._report(request)
        finally:
            timer.cancel()
            if not request.ended:
                self._counts.cancelled += 1
                request.end()

    def _join(self, asked: Asked, prepares: bool) -> Request:
        """A request that waits in the line. Raises what can be said at once."""
        options = {"max_new_tokens": self._settings.max_new_tokens, **asked.options}
        system = self._settings.system if asked.system is None else asked.system
        if not prepares:
            check_question(asked.prompt, options)
            check_wanted(asked.evidence)
            check_timestamps(asked.timestamps)
        check_system(system)
        if self._stopping or self._worker is None:
            self._counts.refused += 1
            raise _shutting_down()
        request = Request(asked, self._keys.of(asked.media, system), system, options, prepares)
        try:
            self._line.join(request.client, request)
        except ApiError:
            self._counts.refused += 1
            raise
        self._wanted.setdefault(request.key, set()).add(request)
        request.on_end = lambda: self._forget(request)
        self._report(request)
        return request

    def _report(self, request: Request) -> None:
        """Tell a request how its film is read, also if it is for another, or how many are served before it."""
        if (coming := self._coming) is not None and coming.key == request.key:
            request.progress(*coming.progress)
        elif request.waits:
            running = self._running is not None
            request.progress("queued", self._line.ahead(request.client, request) + running)

    def _time_out(self, request: Request) -> None:
        if not request.ended:
            self._counts.timed_out += 1
            seconds = self._settings.timeout
            request.end(
                ApiError(
                    504,
                    f"the answer was not complete after {seconds:g} s: ask again, or raise --timeout.",
                    code="timeout",
                )
            )

    def _forget(self, request: Request) -> None:
        """A request has ended: nobody waits for it, nor by it for its session."""
        self._line.leave(request.client, request)
        others = self._wanted[request.key]
        others.discard(request)
        if others:
            return
        del self._wanted[request.key]
        if self._coming is not None and self._coming.key == request.key:
            self._coming.opening.stop()

    # ---- the worker

    async def _work(self) -> None:
        while not self._stopping:
            for request in await self._line.take():
                request.waits = False
                self._running, began = request, time.monotonic()
                try:
                    await self._serve(request)
                except (ApiError, TieredKVError) as error:
                    self._fail(request, error)
                except Exception as error:
                    log.exception("A request failed.")
                    self._fail(request, error)
                finally:
                    self._running = None
                    self._line.served(time.monotonic() - began)

    def _fail(self, request: Request, error: BaseException) -> None:
        if not request.ended:
            self._counts.failed += 1
            request.end(error)

    async def _serve(self, request: Request) -> None:
        """Open the session and answer. Does nothing more once the request has ended."""
        opened, reused = await self._open(request)
        if request.ended:
            return
        if request.prepares:
            media = opened.session.media
            self._counts.served += 1
            seconds = sum(each.facts.seconds or 0.0 for each in media)
            request.emit(Ready(reused, sum(each.tokens for each in media), seconds))
            return
        try:
            with self._sessions.in_use(opened):
                request.answering = task = asyncio.create_task(self._answer(request, opened, reused))
                await asyncio.wait({task})
                if not task.cancelled():
                    task.result()
        except SessionError:  # its file or the model is not what it was: the next question opens it anew
            self._sessions.discard(opened)
            raise

    async def _open(self, request: Request) -> tuple[OpenSession, bool]:
        """The session of a request, and whether it was there. Goes on without the request while others wait for it."""
        if (found := self._sessions.find(request.key)) is not None:
            self._counts.open_already += 1
            return found, True
        loop, asked = asyncio.get_running_loop(), request.asked

        def tell(stage: Any, done: int, total: int | None) -> None:
            coming.progress = (stage, done, total)
            for waiting in self._wanted.get(request.key, ()):
                waiting.progress(stage, done, total)

        def report(stage: Any, done: int, total: int | None) -> None:
            loop.call_soon_threadsafe(tell, stage, done, total)

        wanted = Wanted(request.key, asked.media, self._source, asked.prompt or "?", request.options)
        opening = Opening(wanted, self._new_session(request.system), self._sessions, report)
        self._coming = coming = _Coming(request.key, opening)
        try:
            opened, loaded = await loop.run_in_executor(self._thread, opening.run)
        finally:
            self._coming = None
        if loaded:
            self._counts.loaded += 1
        else:
            self._counts.ingested += 1
        return opened, loaded

    def _new_session(self, system: str | None) -> VideoSession:
        return VideoSession(
            self._model,
            self._processor,
            self._tiers,
            system=system,
            source=self._origin,
            default_cap=self._cap,
            cap_is_default=self._cap_is_default,
        )

    async def _answer(self, request: Request, opened: OpenSession, reused: bool) -> None:
        asked = request.asked
        conversation = opened.conversations.begin(asked.turns)
        options = {**request.options, "evidence": asked.evidence, "timestamps": asked.timestamps}
        request.progress("question")
        work = opened.session.asking(asked.prompt, options, chat=True, stream=True, conversation=conversation)
        stream = AsyncAnswerStream(work)
        async for piece in stream:
            request.emit(Piece(piece))
        generation = stream.generation
        opened.conversations.keep(conversation)
        self._counts.served += 1
        request.emit(Answer(generation, generation.finish_reason, reused, _tokens(opened.session, generation)))
        for observer in self.observers:
            observer(generation)


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down: ask again later.", code="shutting_down", retry_after=30)


def _name_of(source: ModelSource | None) -> str:
    """What clients call a model: its hub id, or the name of its folder."""
    if source is None:
        return "model"
    if source.model == BUNDLED:
        return "tieredkv-tiny"
    return Path(source.model).name if Path(source.model).is_absolute() else source.model


def _tokens(session: VideoSession, generation: Generation) -> tuple[Token, ...] | None:
    """With `evidence="tokens"`, each token's text and moments."""
    found = generation.evidence
    if found is None or found.tokens is None:
        return None
    texts = token_texts(session.template.text, generation.token_ids)
    return tuple(
        Token(text, tuple(moment.as_dict() for moment in moments))
        for text, moments in zip(texts, found.tokens, strict=True)
    )
