"""tieredkv chat: a conversation about one video."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

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


def chat(
    context: typer.Context,
    videos: Annotated[
        list[str] | None,
        typer.Argument(metavar="[VIDEO]...", help="Files of videos and pictures; not needed with a saved session."),
    ] = None,
    model: Model = None,
    weights: Weights = None,
    session: Annotated[
        Path | None,
        typer.Option(
            help="A saved session to continue; if the file does not exist, the new session is saved to it [none]."
        ),
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
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object per answer.")] = False,
) -> None:
    """Talk about a video, or several videos and pictures. Each answer takes earlier questions and answers into account.

    Type /help for commands. With --session the conversation is kept, however the chat ends. From a pipe, reads one
    question per line, and exits with 1 if any failed.
    """
    from tieredkv.cli.checks import check_options
    from tieredkv.cli.lines import lines
    from tieredkv.cli.opening import check_model, is_there, opened
    from tieredkv.session.conversation_file import one_chat
    from tieredkv.video.fetched import fetched

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
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    answering = options | given(timestamps=timestamps or None)
    check_options(tiers, sampling, max_new_tokens)
    continued = session is not None and is_there(session)
    if session is not None and continued:
        context.with_resource(one_chat(session))
    else:  # no file names the model
        check_model(model, weights)
    films = context.with_resource(fetched(videos or [], allow_url, progress=True))
    with opened(
        context,
        model,
        films,
        session,
        tiers=tiers,
        sampling=sampling,
        system=system,
        weights=weights,
        **options,
    ) as (video_session, unsaved):
        from tieredkv.cli.stats import counted
        from tieredkv.cli.talk import Talk
        from tieredkv.cli.terminal import ended_by_signals

        if unsaved is not None:
            print(f"tieredkv: {unsaved}", file=sys.stderr)
        elif session is not None and not continued:
            context.with_resource(one_chat(session))
        talk = Talk(video_session, answering, as_json, save_to=session)
        interactive = sys.stdin.isatty()
        if interactive:
            earlier = f", {counted(len(video_session.history), 'question')} so far" if video_session.history else ""
            tokens = counted(sum(grid.visual_tokens for grid in video_session.videos), "visual token")
            print(f"{tokens}{earlier}. Ask, or /help.", file=sys.stderr)
        with ended_by_signals():
            try:
                talk.run(lines("> "))
            finally:
                talk.keep()
    if unsaved is not None or not talk.kept or (talk.failed and not interactive):
        raise typer.Exit(1)


def add_to(app: typer.Typer) -> None:
    app.command("chat", epilog="Example: tieredkv chat film.mp4 -m Qwen/Qwen2.5-VL-3B-Instruct --session film.tkv")(
        chat
    )
