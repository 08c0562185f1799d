"""tieredkv ask: one question."""

from __future__ import annotations

import os
import sys
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
)
from tieredkv.errors import OptionError
from tieredkv.storage.json_text import print_json

if TYPE_CHECKING:
    from tieredkv.session.results import Generation


def ask(
    context: typer.Context,
    words: Annotated[
        list[str], typer.Argument(metavar="[VIDEO]... QUESTION", help="Files of videos and pictures, and the question.")
    ],
    model: Model = None,
    weights: Weights = None,
    session: Annotated[
        Path | None,
        typer.Option(help="A saved session to ask; if the file does not exist, the new session is saved to it [none]."),
    ] = None,
    gpu_kv_gb: GpuGiB = None,
    host_kv_gb: HostGiB = None,
    host_kv_bits: HostBits = None,
    step_overhead: StepOverhead = None,
    ahead: Ahead = None,
    policy: PolicyName = None,
    fps: Fps = None,
    max_frames: MaxFrames = None,
    max_pixels: MaxPixels = None,
    fit: Fit = False,
    start: Start = None,
    end: End = None,
    skip_damaged: SkipDamaged = False,
    subtitles: Subtitles = None,
    timestamps: Timestamps = False,
    allow_url: AllowUrl = False,
    system: System = None,
    max_new_tokens: NewTokens = 256,
    evidence: Annotated[
        Path | None, typer.Option(help="Write the moments that were attended to, as .png or .html [not written].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print answer, evidence and statistics as JSON.")] = False,
) -> None:
    """Answer one question about a video, about several videos and pictures, or about a saved session."""
    from tieredkv.cli.checks import check_options, refuse_missing_question
    from tieredkv.cli.opening import check_model, is_there, opened
    from tieredkv.evidence.target import check_target
    from tieredkv.models.prompts import check_prompt
    from tieredkv.video.fetched import fetched
    from tieredkv.video.urls import is_url

    *videos, question = words
    if len(videos) > 1 and (missing := [video for video in videos if not (is_url(video) or os.path.exists(video))]):
        raise OptionError(f"ask takes files and then one question, in quotes: {missing[0]}: no such file.")
    if len(videos) != 1 or os.path.isfile(question):
        refuse_missing_question(question)
    if evidence is not None:
        check_target(evidence)
    sampling = given(fps=fps, max_frames=max_frames, max_pixels=max_pixels, start=start, end=end)
    sampling |= given(skip_damaged=skip_damaged or None, subtitles=subtitles, fit=fit or None)
    tiers = given(
        gpu_kv_gb=gpu_kv_gb,
        host_kv_gb=host_kv_gb,
        host_kv_bits=host_kv_bits,
        policy=policy,
        step_overhead=step_overhead,
        ahead=ahead,
    )
    check_prompt(question)
    check_options(tiers, sampling, max_new_tokens)
    if session is None or not is_there(session):  # else the file names the model
        check_model(model, weights)
    films = context.with_resource(fetched(videos, allow_url, progress=True))
    with opened(
        context,
        model,
        films,
        session,
        tiers=tiers,
        sampling=sampling,
        system=system,
        weights=weights,
        question=question,
        max_new_tokens=max_new_tokens,
    ) as (video_session, unsaved):
        from tieredkv.cli.stats import say_times
        from tieredkv.cli.terminal import TerminalStreamer

        counter = TerminalStreamer(video_session.processor.tokenizer, shown=False)
        answer = video_session.ask(question, max_new_tokens=max_new_tokens, timestamps=timestamps, streamer=counter)
    if as_json:
        print_json(answer.as_dict())
    else:
        typer.echo(answer.text)
    say_times(answer)
    if evidence is not None:
        lacks = "" if videos else ", with times but no frames: to see them, give the film before the question"
        print(f"tieredkv: wrote {_draw(answer, evidence, question, films)}{lacks}.", file=sys.stderr)
    if unsaved is not None:
        print(f"tieredkv: {unsaved}", file=sys.stderr)
        raise typer.Exit(1)


def _draw(answer: Generation, path: Path, question: str, videos: list[Any]) -> str:
    """Write the evidence of an answer, of several videos and pictures each to a file with its number; returns what was
    written."""
    from tieredkv.evidence.save import save_evidence

    assert answer.evidence is not None
    shown: Any = videos if len(videos) > 1 else videos[0] if videos else None
    if not answer.evidence.parts:
        return str(save_evidence(answer, path, question=question, video=shown))
    files = [path.with_stem(f"{path.stem}-{number + 1}") for number in range(len(answer.evidence.parts))]
    for number, file in enumerate(files):
        save_evidence(answer, file, question=question, video=shown, medium=number)
    return f"{', '.join(map(str, files[:-1]))} and {files[-1]}"


def add_to(app: typer.Typer) -> None:
    app.command("ask", epilog='Example: tieredkv ask film.mp4 "What is on the table?" -m Qwen/Qwen2.5-VL-3B-Instruct')(
        ask
    )
