"""VideoSession: one video ingested once, any number of questions, each answered as if asked first."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

from tieredkv.config import TierConfig
from tieredkv.errors import SessionError, TieredKVError, UnsupportedModelError
from tieredkv.evidence.target import Wanted, check_wanted
from tieredkv.models import families, kernels
from tieredkv.models.chat_template import ChatTemplate
from tieredkv.models.families.base import Positions, VideoFamily, VideoGrid
from tieredkv.models.prompts import check_prompt
from tieredkv.models.timestamps import check_timestamps, times_request
from tieredkv.models.wrapped import unwrapped
from tieredkv.progress import Progress, progress_bar
from tieredkv.session import conversation_file, generation, question, session_file
from tieredkv.session.aio import AsyncAsking
from tieredkv.session.cached_video import CachedVideo
from tieredkv.session.checkpoint import Checkpoint
from tieredkv.session.conversation import Conversation
from tieredkv.session.conversation_file import ConversationFile
from tieredkv.session.default_cap import DefaultCap
from tieredkv.session.ingest import Ingest
from tieredkv.session.ingested_video import IngestedVideo, Medium
from tieredkv.session.job import Job, Work
from tieredkv.session.origin import ModelSource
from tieredkv.session.question import UserQuestion
from tieredkv.session.results import Generation, IngestStats
from tieredkv.session.stream import AnswerStream, check_stream
from tieredkv.session.turns import Turns
from tieredkv.storage.tensor_file import Stored
from tieredkv.video.sampling import Sampling


class VideoSession(AsyncAsking):
    """A video's keys and values in two tiers, and the questions asked about it.

    Owns all its state: nothing is kept on the model, so sessions on one model are independent. Created by
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
        system: str | None = None,
        source: ModelSource | None = None,
        default_cap: DefaultCap | None = None,
        cap_is_default: bool = False,
    ) -> None:
        """model, processor: as transformers loads them. source: what `save` names as the model's place; None: where it
        says it was loaded from. default_cap: why `tiers` have the cap that they have, if it follows from a card.
        cap_is_default: whether the cap was not given. The rest as in `tieredkv.open_session`."""
        model = unwrapped(model)
        device = model.get_input_embeddings().weight.device
        if device.type not in ("cpu", "cuda"):
            raise UnsupportedModelError(f"the model is on {device}: tieredkv runs on CUDA devices and the CPU.")
        self.model, self.processor, self.tiers = model, processor, tiers
        self.template = ChatTemplate(families.video_family(model.config), processor, positions, system)
        self.source = source or ModelSource.of(model)
        self.default_cap = default_cap
        """How `tiers.gpu_kv_gb` follows from the card; None if it was given, or on the CPU."""
        self._cap_is_default = cap_is_default
        self._progress = progress
        self._turns = Turns()
        self._ingest: Ingest | None = None
        """The ingest in progress."""
        self._checkpoint: Checkpoint | None = None
        """Of the ingest, until the session is saved."""
        self._cached: CachedVideo | None = None
        """None before the ingest and after `close`."""
        self._ingested: IngestedVideo | None = None
        self._conversation = Conversation()
        self._files: dict[Path, ConversationFile] = {}
        """By the session file that each is beside: those this session was loaded from or saved to."""
        self._advised = False
        """Whether the first answer has said which kernels are missing."""

    # ---- the video

    def ingest(
        self,
        video: Any,
        sampling: Sampling | None = None,
        *,
        question: str = "?",
        max_new_tokens: int = 1,
        checkpoint: str | Path | None = None,
        save_to: str | Path | None = None,
        report: Progress | None = None,
        make_room: Callable[[int, int], None] | None = None,
    ) -> None:
        """Decode, encode and prefill the video. Once per session.

        video, checkpoint: as in `tieredkv.open_session`. sampling: None takes all of it, at the processor's rate.
        question, max_new_tokens: the expected question, if known; the budgets are checked for it before anything is
        decoded. save_to: where the session will be saved; the disk is checked for room too. report: called with the
        tokens that are cached and how many are expected, now and then. make_room: called once with the bytes of host
        memory that the session will take and those of its file, before budgets are checked; may raise. Both are called
        on this thread. Raises `VideoError`, `BudgetError` or `SessionError` and leaves the session without a video.
        `close` from another thread ends it with a `TieredKVError`.
        """
        with self._turns.lock:
            self._check_empty()
            kept = None if checkpoint is None else Checkpoint(Path(checkpoint), self.source)
            self._ingest = Ingest(self.model, self.template, self.tiers, self._progress, report, make_room)
            try:
                if self._turns.closed:  # since the check
                    self._ingest.cancel()
                self._cached = self._ingest.run(video, sampling or Sampling(), question, max_new_tokens, kept, save_to)
                self._checkpoint, kept = kept, None
            finally:
                self._ingest = None
                if kept is not None:
                    kept.close()
            self._ingested, self.template = self._cached.video, self._cached.template

    def save(self, path: str | Path) -> int:
        """Write the session to a file that `tieredkv.load_session` loads without the video; returns bytes written.

        The file holds the cache of the video, the conversation so far, and what identifies model, processor and video.
        An older file of this name is replaced as a whole or not at all. The checkpoint of the ingest, if there is one,
        is removed afterwards. Raises `SessionError`.
        """
        with self._turns.lock:
            cached, turns, file = self._ready(), self._conversation.turns, Path(path)
            conversation_file.check(file)
            with progress_bar("save", "B", self._progress) as bar:
                nbytes, checksum = session_file.write(file, cached, turns, self.source, self._cap_is_default, bar)
            beside = self._files[file.absolute()] = ConversationFile(file.absolute(), checksum, turns)
            beside.remove()
            if self._checkpoint is not None:
                self._checkpoint.remove()
            return nbytes

    def save_conversation(self, path: str | Path) -> bool:
        """Keep the conversation with a file that this session was loaded from or saved to; returns whether it changed.

        It is written beside the file, as `path` with ".chat" after it, without writing the file again, and
        `tieredkv.load_session` reads both. Raises `SessionError` if the file is another by now, or the disk fails; what
        was kept before is then still there.
        """
        with self._turns.lock:
            self._check_open()
            turns, file = self._conversation.turns, self._files.get(Path(path).absolute())
            if file is not None:
                return file.write(turns)
            if turns:
                raise SessionError(
                    f"{path} does not hold this session, so the conversation is not kept: save it first."
                )
            return False

    def is_saved_to(self, path: str | Path) -> bool:
        """Whether this session was loaded from this file or saved to it, and the file is still there."""
        return Path(path).absolute() in self._files and Path(path).is_file()

    def restore(self, stored: Stored, first_picture: float = 0.0) -> None:
        """Restore a session that `save` wrote, instead of `ingest`. See `tieredkv.load_session`.

        first_picture: when the video's first picture is shown, from which older files count.
        """
        with self._turns.lock:
            self._check_empty()
            state = session_file.state_of(stored, first_picture)
            known = state.video
            template = ChatTemplate(
                self.family, self.processor, known.positions, known.system, [each.kind for each in known.media]
            )
            beside = ConversationFile(stored.path.absolute(), stored.checksum, state.history)
            self._cached = session_file.load(stored, state, self.model, template, self.tiers)
            self._files[stored.path.absolute()] = beside
            self.template, self._ingested, self._conversation = template, state.video, Conversation(beside.turns)

    # ---- questions

    @overload
    def ask(self, prompt: str, *, stream: Literal[False] = ..., **options: Any) -> Generation: ...
    @overload
    def ask(self, prompt: str, *, stream: Literal[True], **options: Any) -> AnswerStream: ...
    def ask(
        self,
        prompt: str,
        *,
        trace: bool = False,
        evidence: Wanted = True,
        timestamps: bool = False,
        stream: bool = False,
        **options: Any,
    ) -> Generation | AnswerStream:
        """Answer a question about the video, as if it were the first asked.

        options: transformers' generation options (`max_new_tokens`, `do_sample`, `temperature`, `stop_strings` ...,
        `streamer`, `stopping_criteria`, `generation_config`). trace: record which chunks each step attended to.
        evidence: report the moments of the video that were attended to; "tokens": also those of every token.
        timestamps: ask for times, which `Generation.times` lists; for one video, and models whose prompts tell them
        when each frame is shown. stream: return an iterator of pieces of text as they are generated, with the answer as
        its `generation` at the end.
        Raises `PromptError`, `OptionError` or `BudgetError`; the session can be asked again after any of them.
        """
        work = self.asking(
            prompt, {**options, "trace": trace, "evidence": evidence, "timestamps": timestamps}, stream=stream
        )
        return AnswerStream(work) if stream else work.run(None)

    @overload
    def chat(self, prompt: str, *, stream: Literal[False] = ..., **options: Any) -> Generation: ...
    @overload
    def chat(self, prompt: str, *, stream: Literal[True], **options: Any) -> AnswerStream: ...
    def chat(
        self,
        prompt: str,
        *,
        trace: bool = False,
        evidence: Wanted = True,
        timestamps: bool = False,
        stream: bool = False,
        **options: Any,
    ) -> Generation | AnswerStream:
        """Continue the conversation: the model sees the questions and answers of earlier `chat` calls.

        Otherwise like `ask`. The last answer is prefilled, exactly, with the new question. Turns before it are kept in
        host memory, and are prefilled again only where they could not be (see "Conversations" in docs/sessions.md); the
        video never is. A turn that fails, or is stopped before the answer is complete, leaves `history` as it was.
        """
        work = self.asking(
            prompt,
            {**options, "trace": trace, "evidence": evidence, "timestamps": timestamps},
            chat=True,
            stream=stream,
        )
        return AnswerStream(work) if stream else work.run(None)

    @property
    def history(self) -> tuple[tuple[str, str], ...]:
        """Questions and answers of the conversation, from `chat`."""
        return tuple(self._conversation.turns)

    def clear_history(self) -> None:
        """Begin another conversation."""
        with self._turns.lock:
            self._conversation = Conversation()

    def asking(
        self,
        prompt: str,
        options: dict[str, Any],
        *,
        chat: bool = False,
        stream: bool = False,
        conversation: Conversation | None = None,
    ) -> Work:
        """The work of `ask` or `chat`. Raises at once for errors that can be found before its turn.

        options: all of theirs except `stream`. conversation: which one a chat continues; None: the session's own.
        """
        options = dict(options)
        trace, evidence = options.pop("trace", False), options.pop("evidence", True)
        timestamps = options.pop("timestamps", False)
        with generation.ending_on_error(options.get("streamer")):
            self._check_open()
            check_stream(stream, options)
            check_wanted(evidence)
            generation.check_options(options, model_config=self.model.generation_config)
            check_prompt(prompt)
            if check_timestamps(timestamps):
                prompt += f"\n{times_request(self.template)}"
        asked = UserQuestion(prompt, options, chat, trace, evidence, timestamps)
        return Work(partial(self._answer, asked, conversation), self._turns.line)

    def _answer(self, user_question: UserQuestion, given: Conversation | None, job: Job | None) -> Generation:
        streamer = user_question.options.get("streamer")
        if job is not None and job.streams:
            streamer = job.streamer(self.template.text)
            user_question = user_question.with_streamer(streamer)
        with generation.ending_on_error(streamer), self._turns.take(job):
            self._advise()
            conversation = self._conversation if given is None else given
            check = partial(self._turns.check_still_wanted, job)
            result, kept = question.ask(self._ready(), user_question, conversation, check)
            if user_question.chat:
                check()
                conversation.add(user_question.prompt, result.text, kept)
            return result

    def _advise(self) -> None:
        if not self._advised:
            self._advised = True
            if advice := kernels.advice(self.model.config, self.model.get_input_embeddings().weight.device):
                warnings.warn(advice, stacklevel=2)

    def new_tokens(self, options: dict[str, Any]) -> int:
        """`max_new_tokens` of a question with these generation options, as far as known without its prompt."""
        return generation.new_tokens(options, self.model.generation_config)

    # ---- what is known of the model and the video

    @property
    def family(self) -> VideoFamily:
        """The adapter of the model's family."""
        return self.template.family

    @property
    def positions(self) -> Positions:
        """How text after the video is numbered."""
        return self.template.positions

    @property
    def video(self) -> VideoGrid | None:
        """The video's tokens; None before the ingest. Raises `TieredKVError` if there are several: see `videos`."""
        if len(self.videos) > 1:
            raise TieredKVError(f"this session has {len(self.videos)} videos and pictures: `videos` lists them.")
        return self.videos[0] if self.videos else None

    @property
    def videos(self) -> tuple[VideoGrid, ...]:
        """The tokens of each video and picture, in the order of the prompt; empty before the ingest."""
        return tuple(each.grid for each in self.media)

    @property
    def media(self) -> tuple[Medium, ...]:
        """What is known of each video and picture, its source among it; empty before the ingest."""
        return () if self._ingested is None else self._ingested.media

    @property
    def head_tokens(self) -> int:
        """Prompt tokens before the first visual token; 0 before the ingest."""
        return 0 if self._ingested is None else self._ingested.head_tokens

    @property
    def sampling(self) -> Sampling | None:
        """How the video was sampled, as asked for; None before the ingest, and if a loaded file does not say."""
        return None if self._ingested is None else self._ingested.sampling

    @property
    def ingest_s(self) -> float:
        """Seconds from the request to a session that can be asked; of a loaded session, those of its ingest."""
        return 0.0 if self._ingested is None else self._ingested.ingest_s

    @property
    def ingest_stats(self) -> IngestStats | None:
        """What the ingest measured; None before it."""
        return None if self._ingested is None else self._ingested.stats

    # ---- what it takes

    @property
    def host_bytes(self) -> int:
        """Host memory of keys and values; that of its conversation is not counted. 0 without a video."""
        return 0 if (cached := self._cached) is None else cached.cache.host_bytes

    @property
    def device_bytes(self) -> int:
        """Device memory counted against the cap now."""
        return 0 if (cached := self._cached) is None else cached.cache.ledger.used_bytes

    def leave_device(self) -> None:
        """Free what the session keeps on the device between questions, for another session. It can be asked as before;
        reading a question then streams all of the past. Waits until a question under way is answered."""
        with self._turns.lock:
            if self._cached is not None:
                self._cached.cache.leave_device()

    # ---- beginning and end

    def _check_open(self) -> None:
        self._turns.check_open(self.model.get_input_embeddings().weight.device.type)

    def _check_empty(self) -> None:
        self._check_open()
        if self._ingested is not None:
            raise TieredKVError("this session has its video already: open another session for another video.")

    def _ready(self) -> CachedVideo:
        """The video of a session that can be asked."""
        self._check_open()
        if self._cached is None:
            raise TieredKVError("this session has no video yet: call ingest first.")
        self._cached.check()
        return self._cached

    def stop(self) -> None:
        """Begin to close, without waiting: stops what `close` stops, and refuses new work."""
        self._turns.close()
        if (ingest := self._ingest) is not None:
            ingest.cancel()

    def close(self) -> None:
        """Free both tiers. May be called twice; any other call afterwards raises.

        Stops an ingest in another thread, streams and work under asyncio; waits until an `ask` or `chat` in another
        thread has been answered.
        """
        self.stop()
        with self._turns.lock:
            for part in (self._ingest, self._cached, self._checkpoint):
                if part is not None:
                    part.close()
            self._ingest = self._cached = self._checkpoint = None
            self._conversation.kept = None

    def __enter__(self) -> VideoSession:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TieredKVError(
            "a session cannot be pickled or copied: save it, and give the other process the file for load_session."
        )
