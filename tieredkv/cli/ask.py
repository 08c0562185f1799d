"""tieredkv ask: one question."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tieredkv.cli.options import (
    AllowUrl,
    End,
    Fit,
    Fps,
    GpuGiB,
    HostGiB,
    MaxFrames,
    MaxPixels,
    Model,
    NewTokens,
    PolicyName,
    SkipDamaged,
    Start,
    System,
    Weights,
    given,
)
from tieredkv.errors import OptionError
from tieredkv.storage.json_text import print_json


def ask(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="[VIDEO] QUESTION", help="A video file, and the question.")],
    model: Model = None,
    weights: Weights = None,
    session: Annotated[
        Path | None,
        typer.Option(help="A saved session to ask; if the file does not exist, the new session is saved to it [none]."),
    ] = None,
    gpu_kv_gb: GpuGiB = None,
    host_kv_gb: HostGiB = None,
    policy: PolicyName = None,
    fps: Fps = None,
    max_frames: MaxFrames = None,
    max_pixels: MaxPixels = None,
    fit: Fit = False,
    start: Start = None,
    end: End = None,
    skip_damaged: SkipDamaged = False,
    allow_url: AllowUrl = False,
    system: System = None,
    max_new_tokens: NewTokens = 256,
    evidence: Annotated[
        Path | None, typer.Option(help="Write the moments that were attended to, as .png or .html [not written].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print answer, evidence and statistics as JSON.")] = False,
) -> None:
    """Answer one question about one video, or about a saved session."""
    from tieredkv.cli.checks import check_options, refuse_missing_question
    from tieredkv.cli.opening import opened
    from tieredkv.evidence.target import check_target
    from tieredkv.models.prompts import check_prompt
    from tieredkv.video.fetched import fetched

    *videos, question = words
    if len(videos) > 1:
        raise OptionError(f"ask takes one video and one question, got {len(words)} arguments: put quotes around each.")
    if not videos:
        refuse_missing_question(question)
    if evidence is not None:
        check_target(evidence)
    sampling = given(fps=fps, max_frames=max_frames, max_pixels=max_pixels, start=start, end=end)
    sampling |= given(skip_damaged=skip_damaged or None, fit=fit or None)
    tiers = given(gpu_kv_gb=gpu_kv_gb, host_kv_gb=host_kv_gb, policy=policy)
    check_prompt(question)
    check_options(tiers, sampling, max_new_tokens)
    film = context.with_resource(fetched(videos[0] if videos else None, allow_url, progress=True))
    with opened(
        context,
        model,
        film,
        session,
        tiers=tiers,
        sampling=sampling,
        system=system,
        weights=weights,
        question=question,
        max_new_tokens=max_new_tokens,
    ) as (video_session, unsaved):
        from tieredkv.cli.terminal import TerminalStreamer

        counter = TerminalStreamer(video_session.processor.tokenizer, shown=False)
        answer = video_session.ask(question, max_new_tokens=max_new_tokens, streamer=counter)
    if as_json:
        print_json(answer.as_dict())
    else:
        typer.echo(answer.text)
    if evidence is not None:
        from tieredkv.evidence.save import save_evidence

        save_evidence(answer, evidence, question=question, video=film)
        lacks = "" if videos else ", with times but no frames: to see them, give the film before the question"
        print(f"tieredkv: wrote {evidence}{lacks}.", file=sys.stderr)
    if unsaved is not None:
        print(f"tieredkv: {unsaved}", file=sys.stderr)
        raise typer.Exit(1)


def add_to(app: typer.Typer) -> None:
    app.command("ask", epilog='Example: tieredkv ask film.mp4 "What is on the table?" -m Qwen/Qwen2.5-VL-3B-Instruct')(
        ask
    )
