"""tieredkv plan: the memory that a video would need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    Weights,
    given,
    model_path,
    typed,
)
from tieredkv.cli.toy import model_or_toy
from tieredkv.storage.json_text import print_json


def plan(
    context: typer.Context,
    videos: Annotated[
        list[str],
        typer.Argument(metavar="VIDEO...", help="Files of videos and pictures, or a whole number of visual tokens."),
    ],
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
    fit: Fit = False,
    start: Start = None,
    end: End = None,
    skip_damaged: SkipDamaged = False,
    subtitles: Subtitles = None,
    allow_url: AllowUrl = False,
    system: System = None,
    max_new_tokens: NewTokens = 256,
    link: Annotated[str, typer.Option(envvar="TIEREDKV_LINK", help="The link to the card, or its GB/s.")] = "pcie4x16",
    card: Annotated[
        str | None,
        typer.Option(envvar="TIEREDKV_CARD", help="The card, such as 'RTX 4090', or GB/s of its memory [none]."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the memory and time that a video, or several videos and pictures, would need. Loads no
    weights and decodes nothing."""
    from tieredkv.cli.checks import check_options, refuse_session
    from tieredkv.cli.opening import check_place
    from tieredkv.cli.process import quick_imports
    from tieredkv.models.quantising import check_weights
    from tieredkv.planning.cards import find_card
    from tieredkv.planning.links import find_link
    from tieredkv.video.fetched import fetched
    from tieredkv.video.paths import check_path

    tokens = len(videos) == 1 and _is_number(videos[0])
    sampling = given(
        fps=fps, max_frames=max_frames, max_pixels=max_pixels, skip_damaged=skip_damaged or None, subtitles=subtitles
    )
    sampling |= given(fit=fit or None)
    if tokens and not typed(context, sampling):
        sampling = {}  # defaults for videos do not apply to a number of tokens
    tiers = given(
        gpu_kv_gb=gpu_kv_gb,
        host_kv_gb=host_kv_gb,
        host_kv_bits=host_kv_bits,
        policy=policy,
        step_overhead=step_overhead,
        ahead=ahead,
    )
    check_weights(weights)
    check_place(model)
    find_link(link)
    if card is not None:
        find_card(card)
    check_options(tiers, {**sampling, **given(start=start, end=end)}, max_new_tokens)
    films = context.with_resource(fetched([] if tokens else videos, allow_url, progress=True))
    for video, film in zip(videos, films, strict=not tokens):
        refuse_session(video)
        check_path(film)
    model = model_or_toy(model, films, "this plan is for the bundled toy model")
    with quick_imports():
        from tieredkv.planning import forecast
    estimate = forecast.plan(
        model_path(model),
        int(videos[0]) if tokens else films if len(films) > 1 else films[0],
        gpu_kv_gb=gpu_kv_gb,
        host_kv_gb=host_kv_gb,
        host_kv_bits=host_kv_bits,
        **given(policy=policy, step_overhead=step_overhead, ahead=ahead),
        **sampling,
        start=start or 0.0,
        end=end,
        system=system,
        weights=weights,
        max_new_tokens=max_new_tokens,
        link=link,
        card=card,
    )
    if estimate.fit is not None:
        typer.echo(f"tieredkv: {estimate.fit}", err=True)
    if as_json:
        print_json(estimate.as_dict())
    else:
        typer.echo(str(estimate))


def _is_number(word: str) -> bool:
    """Whether this is a number of tokens, and no file."""
    return word.isascii() and word.isdigit() and len(word) < 20 and not Path(word).exists()


def add_to(app: typer.Typer) -> None:
    app.command("plan", epilog='Example: tieredkv plan film.mp4 -m Qwen/Qwen2.5-VL-3B-Instruct --card "RTX 3060"')(plan)
