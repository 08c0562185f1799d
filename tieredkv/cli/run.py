"""tieredkv run: answer a file of questions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tieredkv.cli.options import (
    Ahead,
    AllowUrl,
    End,
    Fit,
    Fps,
    GpuGiB,
    HostBits,
    HostGiB,
    MaxFrames,
    MaxPixels,
    Model,
    NewTokens,
    PolicyName,
    SkipDamaged,
    Start,
    StepOverhead,
    Subtitles,
    System,
    Timestamps,
    Weights,
    given,
    model_path,
)
from tieredkv.cli.process import quick_imports
from tieredkv.cli.toy import model_or_toy
from tieredkv.errors import BatchError
from tieredkv.progress import note

if TYPE_CHECKING:
    from tieredkv.batch.questions_file import BatchQuestion
    from tieredkv.batch.session_folder import SessionFolder
    from tieredkv.session.video_session import VideoSession
    from tieredkv.video.sampling import Sampling


def run(
    questions: Annotated[str, typer.Argument(help="The file of questions, JSON lines; - for stdin.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The file of answers, JSON lines; - for stdout.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue an existing file of answers.")] = False,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="With --resume: ask failed questions again.")
    ] = False,
    sessions: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keeps each video's session for later runs [none].")
    ] = None,
    model: Model = None,
    weights: Weights = None,
    gpu_kv_gb: GpuGiB = None,
    host_kv_gb: HostGiB = None,
    host_kv_bits: HostBits = None,
    step_overhead: StepOverhead = None,
    ahead: Ahead = None,
    policy: PolicyName = None,
    fps: Fps = None,
    max_frames: MaxFrames = None,
    max_pixels: MaxPixels = None,
    skip_damaged: SkipDamaged = False,
    subtitles: Subtitles = None,
    timestamps: Timestamps = False,
    fit: Fit = False,
    allow_url: AllowUrl = False,
    start: Start = None,
    end: End = None,
    system: System = None,
    max_new_tokens: NewTokens = 256,
) -> None:
    """Answer a file of questions, each video ingested once. --resume continues an interrupted run.

    A line is {"video": "a.mp4", "question": "What ...?"}, optionally with "id", "evidence", "fps", "start" and the
    like, and generation options. A folder or a glob stands for each film in it. Paths are relative to the file. A
    question that fails gets a line with "error", and the exit code is then 1.
    """
    from tieredkv.batch.answers import Answers, PrintedAnswers
    from tieredkv.batch.answers_file import AnswersFile
    from tieredkv.batch.questions_file import read_questions
    from tieredkv.batch.run import run as run_batch
    from tieredkv.cli.checks import check_options
    from tieredkv.cli.opening import check_model
    from tieredkv.models.prompts import check_system
    from tieredkv.video.urls import is_url

    if retry_errors and not resume:
        raise BatchError("--retry-errors continues an existing file of answers: give --resume too.")
    if resume and output == "-":
        raise BatchError("--resume continues a file of answers: give -o a file, not stdout.")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    answering = options | given(timestamps=timestamps or None)
    tiers = given(
        gpu_kv_gb=gpu_kv_gb,
        host_kv_gb=host_kv_gb,
        host_kv_bits=host_kv_bits,
        policy=policy,
        step_overhead=step_overhead,
        ahead=ahead,
    )
    sampled = given(fps=fps, max_frames=max_frames, max_pixels=max_pixels, start=start, end=end)
    sampled |= given(skip_damaged=skip_damaged or None, subtitles=subtitles, fit=fit or None)
    sampling = check_options(tiers, sampled, max_new_tokens)
    check_system(system)
    check_model(model, weights)
    batch = read_questions(None if questions == "-" else Path(questions), sampling)
    answers: Answers = PrintedAnswers()
    if output != "-":
        answers = AnswersFile(Path(output), batch, resume=resume, retry_errors=retry_errors)
    kept = None
    with answers:
        if not all(map(answers.has, batch)):
            asked = [question for question in batch if not answers.has(question)]
            films = dict.fromkeys(each.video if is_url(each.video) else each.path for each in asked)
            path = model_path(model_or_toy(model, films, skip_unreadable=True))
            from tieredkv.batch.session_folder import SessionFolder
            from tieredkv.session.origin import ModelSource

            kept = None if sessions is None else SessionFolder(sessions, ModelSource.of(path, weights), _say)
            opener = _opener(path, weights, tiers, system, options, kept, allow_url)
            answers.begin()
            run_batch(batch, answers, opener, answering, _say)
    failed, unsaved = len(answers.failed), kept.unsaved if kept else 0
    again = ": --resume --retry-errors asks again" if failed and output != "-" else ""
    lost = f"; sessions not saved: {unsaved}" if unsaved else ""
    _say(f"{'stdout' if output == '-' else output}: {len(answers.answered)} answered, {failed} failed{again}{lost}.")
    raise typer.Exit(1 if failed or unsaved else 0)


def _opener(
    model: str,
    weights: str | None,
    tiers: dict[str, Any],
    system: str | None,
    options: dict[str, Any],
    kept: SessionFolder | None,
    allow_url: bool,
) -> Callable[[Path, Sampling, Sequence[BatchQuestion]], VideoSession]:
    """Load the model, and return what opens the session of a video for its questions."""
    from tieredkv.cli.opening import report_damage, say_default_cap
    from tieredkv.session.origin import ModelSource
    from tieredkv.video.fetched import fetched
    from tieredkv.video.paths import check_path
    from tieredkv.video.urls import is_url

    note(f"loading {model}")
    with quick_imports():
        from tieredkv import api
        from tieredkv.models import loading
        from tieredkv.session.default_cap import check_weights_fit

    loaded, processor = loading.load(model, None, weights, check_weights_fit)
    said = False

    def filled(video: str | PathLike[str], sampling: Sampling, pending: Sequence[BatchQuestion]) -> VideoSession:
        nonlocal said
        check_path(video)
        session = api.new_session(loaded, processor=processor, progress=True, system=system, **tiers)
        session.source = ModelSource.of(model, weights)
        if not said:
            say_default_cap(session)
            said = True
        try:
            # The shortest answer must fit; a longer one that does not is an error of its own question.
            least = min(session.new_tokens(options | question.options) for question in pending)
            asked: dict[str, Any] = {"question": pending[0].text if len(pending) == 1 else "?", "max_new_tokens": least}
            if kept is None:
                session.ingest(video, sampling, **asked)
            else:
                kept.fill(session, video, sampling, **asked)
        except BaseException:
            session.close()
            raise
        return session

    def open_session(video: Path, sampling: Sampling, pending: Sequence[BatchQuestion]) -> VideoSession:
        url = pending[0].video  # of which `video` is no path
        with fetched(url if is_url(url) else video, allow_url, progress=True) as film:
            session = filled(film, sampling, pending)
        report_damage(session)
        return session

    return open_session


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def add_to(app: typer.Typer) -> None:
    example = "tieredkv run questions.jsonl -o answers.jsonl -m Qwen/Qwen2.5-VL-3B-Instruct --resume"
    app.command("run", epilog=f"Example: {example}")(run)
