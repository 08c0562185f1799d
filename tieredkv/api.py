"""The entry points: generate, agenerate, open_session, load_session."""

from __future__ import annotations

from collections.abc import Coroutine
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, overload

from tieredkv.config import DEFAULT_FPS, FIELDS, TierConfig, refuse_policy_fields, tier_config
from tieredkv.errors import OptionError
from tieredkv.evidence.target import check_wanted
from tieredkv.models.families.base import Positions
from tieredkv.models.loading import load
from tieredkv.models.prompts import check_prompt, check_system
from tieredkv.models.timestamps import check_timestamps
from tieredkv.session import generation, origin, session_file
from tieredkv.session.aio import AsyncAnswerStream, answering
from tieredkv.session.default_cap import check_weights_fit, with_default_cap
from tieredkv.session.job import Job, Work
from tieredkv.session.origin import ModelSource
from tieredkv.session.results import Generation
from tieredkv.session.stream import AnswerStream, check_stream
from tieredkv.session.video_session import VideoSession
from tieredkv.storage import tensor_file
from tieredkv.video.fetched import fetched
from tieredkv.video.media import check_media, media_of
from tieredkv.video.sampling import Sampling

_VIDEO_OPTIONS = {field.name for field in fields(Sampling)}
_OPENING = {
    *(*FIELDS, *_VIDEO_OPTIONS, "allow_url", "tiers", "processor", "weights", "positions", "progress", "system")
}


def open_session(
    model: Any,
    video: Any,
    *,
    gpu_kv_gb: float | None = None,
    tiers: TierConfig | None = None,
    processor: Any = None,
    weights: str | None = None,
    fps: float | None = None,
    source_fps: float | None = None,
    max_frames: int | None = None,
    start: float = 0.0,
    end: float | None = None,
    max_pixels: int | None = None,
    skip_damaged: bool = False,
    subtitles: str | None = None,
    fit: bool = False,
    allow_url: bool = False,
    positions: Positions = "published",
    progress: bool = False,
    system: str | None = None,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> VideoSession:
    """Ingest a video, or several videos and pictures, and return the session that answers questions about them.

    model: a transformers model, or a local path or hub id to load one from. processor: the model's own; None loads the
    one stored with the model. weights: "4bit" or "8bit" quantises the decoder's weights while they are loaded (None: as
    they are stored); the vision tower and the output layer stay as they are. video: a path; a URL, with `allow_url`,
    which is downloaded to a temporary file; a binary file object; a reader of decord or torchcodec; or frames: a list
    of PIL images, `(T, H, W, 3)` or `(T, 3, H, W)` as ndarray or tensor, uint8 or floats in [0, 1], or an iterator of
    single ones, taken at `source_fps` per second (None: at `fps`); or a list with a path, a `tieredkv.Video` or a
    `tieredkv.Picture` in it: several, in this order, with still pictures where the family takes them. fps: frames
    sampled per second (None: the processor's own rate). max_frames: at most this many frames, spread evenly over the
    video. max_pixels: most pixels of a frame as the vision tower sees it, in place of the processor's limits (None:
    those). fit: choose fps and max_pixels, as far as they are None, so that the video fits the budgets;
    `VideoSession.sampling` says which. start, end: seconds of the video to read, as players show them. skip_damaged: go
    over what is damaged or missing in a file; `session.ingest_stats.damaged` says which seconds. subtitles: a subtitle
    file, or "auto" for the video's own text track, written between the frames by time. gpu_kv_gb: hard cap in
    GiB on device memory for keys and values; None: what the card has left beside weights and activations, on the CPU 4
    (`tiers.gpu_kv_gb` of the session says how much, `default_cap` why). tiers: every other setting; its fields may be
    given as keywords instead. positions: "published" or "stock", how text after the video is numbered. progress: show a
    bar on stderr. system: the system prompt of every question; None: the chat template's own, if it has one.
    checkpoint: a folder in which a long ingest leaves what it has cached; the same call goes on from there after an
    interruption. It is removed when the session is saved.

    Raises `UnsupportedModelError`, `VideoError`, `BudgetError`, `OptionError` or, for a checkpoint that is in use or of
    another ingest, `SessionError`, all of them `TieredKVError`.
    """
    sampling = Sampling(fps, source_fps, max_frames, start, end, max_pixels, skip_damaged, subtitles, fit)
    check_media(video, allow_url)
    session = new_session(
        model,
        gpu_kv_gb=gpu_kv_gb,
        tiers=tiers,
        processor=processor,
        weights=weights,
        positions=positions,
        progress=progress,
        system=system,
        **options,
    )
    try:
        with fetched(video, allow_url, progress) as local:
            session.ingest(local, sampling, checkpoint=checkpoint)
    except BaseException:
        session.close()
        raise
    return session


def new_session(
    model: Any,
    *,
    gpu_kv_gb: float | None = None,
    tiers: TierConfig | None = None,
    processor: Any = None,
    weights: str | None = None,
    positions: Positions = "published",
    progress: bool = False,
    system: str | None = None,
    **options: Any,
) -> VideoSession:
    """A session without a video, for its `ingest`. Options as in `open_session`."""
    _check_tier_options(options)
    config = tier_config(tiers, {"gpu_kv_gb": gpu_kv_gb, **options})
    if positions not in get_args(Positions):
        raise OptionError(f"positions={positions!r} is not valid: give 'published' or 'stock'.")
    check_system(system)
    source = ModelSource.of(model, weights)
    model, processor = load(model, processor, weights, check_weights_fit)
    cap = None
    if tiers is None and gpu_kv_gb is None:
        config, cap = with_default_cap(model, config)
    return VideoSession(
        model,
        processor,
        config,
        positions=positions,
        progress=progress,
        system=system,
        source=source,
        default_cap=cap,
    )


def load_session(
    path: str | Path,
    model: Any = None,
    *,
    video: Any = None,
    gpu_kv_gb: float | None = None,
    processor: Any = None,
    allow_url: bool = False,
    weights: str | None = None,
    progress: bool = False,
    system: str | None = None,
    **options: Any,
) -> VideoSession:
    """Load a session that `VideoSession.save` wrote; no video is decoded, encoded or prefilled.

    The file is mapped: each layer is read, and verified against its checksum, when it is first attended to. It may be
    replaced meanwhile but not changed in place. model, processor: those the session was saved with; without them, the
    model that the file names and the processor stored with it. A model that is loaded here is quantised as the saved
    session's was; weights: if given, raise unless that was so. video: if given, raise unless the session is about this
    file or these frames; a URL is downloaded if `allow_url`. system: if given, raise unless the session was saved with
    this system prompt. gpu_kv_gb, options: fields of `TierConfig` that replace the saved ones.

    Raises `SessionError` if the file is not a session, is damaged, or belongs to another model, processor or video;
    damage to a layer is found by the first question.
    """
    if "tiers" in options:
        raise OptionError("'tiers' cannot be given: give the fields that replace saved ones as keywords.")
    if fixed := sorted(options.keys() & (_OPENING - FIELDS)):
        raise OptionError(f"{fixed[0]!r} cannot be given: the video of a saved session is not read again.")
    given = {**options, **({} if gpu_kv_gb is None else {"gpu_kv_gb": gpu_kv_gb})}
    _check_tier_options(given)
    check_system(system)
    stored = tensor_file.read(path)
    tiers = session_file.tiers_of(stored, given)
    if system is not None:
        session_file.check_same_system(stored, system)
    first_picture = 0.0
    if video is not None:
        sampled = origin.sampling_of(stored.path, stored.manifest)
        skip_damaged = sampled is not None and sampled.skip_damaged
        with fetched(video, allow_url, progress) as local:
            sources = [each.open(Sampling(DEFAULT_FPS, skip_damaged=skip_damaged)) for each in media_of(local)]
            session_file.check_same_media(stored, sources)
        first_picture = sources[0].start
    if model is None:
        model = origin.model_of(stored.path, stored.manifest).path
    if isinstance(model, str | Path):
        weights = origin.weights_of(stored.path, stored.manifest, weights)
    source = origin.named_again(stored.manifest, ModelSource.of(model, weights))
    model, processor = load(model, processor, weights, check_weights_fit)
    session = VideoSession(model, processor, tiers, progress=progress, source=source)
    session.restore(stored, first_picture)
    return session


@overload
def generate(
    model: Any,
    video: Any,
    prompt: str,
    gpu_kv_gb: float | None = None,
    *,
    stream: Literal[False] = False,
    **options: Any,
) -> Generation: ...
@overload
def generate(
    model: Any, video: Any, prompt: str, gpu_kv_gb: float | None = None, *, stream: Literal[True], **options: Any
) -> AnswerStream: ...
def generate(
    model: Any, video: Any, prompt: str, gpu_kv_gb: float | None = None, *, stream: bool = False, **options: Any
) -> Generation | AnswerStream:
    """Answer one question about one video: a session with a single question.

    options: those of `open_session` and of `VideoSession.ask`: transformers' generation options, `trace`, `evidence`
    and `timestamps`. stream: return an iterator of pieces of text, as `VideoSession.ask` does. Raises what these raise;
    an unknown option raises `OptionError` before anything is loaded.
    """
    work = _single_question(model, video, prompt, gpu_kv_gb, stream, options)
    return AnswerStream(work) if stream else work.run(None)


@overload
def agenerate(
    model: Any,
    video: Any,
    prompt: str,
    gpu_kv_gb: float | None = None,
    *,
    stream: Literal[False] = False,
    **options: Any,
) -> Coroutine[Any, Any, Generation]: ...
@overload
def agenerate(
    model: Any, video: Any, prompt: str, gpu_kv_gb: float | None = None, *, stream: Literal[True], **options: Any
) -> AsyncAnswerStream: ...
def agenerate(
    model: Any, video: Any, prompt: str, gpu_kv_gb: float | None = None, *, stream: bool = False, **options: Any
) -> Any:
    """`generate` for asyncio: await it, or with `stream=True` iterate over it with `async for`.

    The event loop is not blocked. Cancelling stops an ingest at its next chunk and decoding at its next step, and
    frees the memory before the `CancelledError` is raised; loading a model is not interrupted. Pass a loaded model if
    several answers are generated at once: loading changes torch's default dtype for all threads.
    """
    return answering(_single_question(model, video, prompt, gpu_kv_gb, stream, options), stream)


def _single_question(
    model: Any, video: Any, prompt: str, gpu_kv_gb: float | None, stream: bool, options: dict[str, Any]
) -> Work:
    """The work of `generate`. Raises at once for errors that can be found without loading anything."""
    opening = {name: value for name, value in options.items() if name in _OPENING}
    asking = {name: value for name, value in options.items() if name not in _OPENING}
    sampled = {name: opening.pop(name) for name in _VIDEO_OPTIONS & opening.keys()}
    streamer = options.get("streamer")
    with generation.ending_on_error(streamer):
        check_stream(stream, options)
        refuse_policy_fields(asking)
        generation.check_options(asking, also=(*_OPENING, "trace", "evidence", "timestamps"))
        check_prompt(prompt)
        check_system(opening.get("system"))
        sampling = Sampling(**sampled)
        allow_url = opening.pop("allow_url", False)
        check_media(video, allow_url)
        check_wanted(asking.get("evidence", True))
        check_timestamps(asking.get("timestamps", False))

    def run(job: Job | None) -> Generation:
        with ExitStack() as opened:
            with generation.ending_on_error(streamer):
                session = opened.enter_context(new_session(model, gpu_kv_gb=gpu_kv_gb, **opening))
                if job is not None:
                    job.on_stop(session.stop)
                with fetched(video, allow_url, bool(opening.get("progress"))) as local:
                    session.ingest(local, sampling, question=prompt, max_new_tokens=session.new_tokens(asking))
            return session.asking(prompt, asking, stream=stream).run(job)

    return Work(run)


def check_question(prompt: str, options: dict[str, Any]) -> None:
    """Raise `PromptError` or `OptionError` for a question that no session could answer. Loads nothing."""
    generation.check_options(options)
    check_prompt(prompt)


def _check_tier_options(options: dict[str, Any]) -> None:
    refuse_policy_fields(options)
    if unknown := sorted(set(options) - FIELDS):
        generation.check_options({unknown[0]: None}, also=tuple(_OPENING))
        raise OptionError(f"{unknown[0]!r} is a generation option: give it to ask, not to open_session.")
