"""tieredkv demo: a generated video and questions about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tieredkv.cli.process import quick_imports


def demo(
    seed: Annotated[int, typer.Option(min=0, help="Seed of the video and the questions.")] = 1_000_000,
    minutes: Annotated[float, typer.Option(help="Length of the video.")] = 8.5,
    share: Annotated[
        float, typer.Option(help="Device memory for keys and values, as a share of the full cache.")
    ] = 0.1,
    plot: Annotated[
        Path | None, typer.Option(help="Draw which chunks each answer selected, as .png [not drawn].")
    ] = None,
    video: Annotated[Path | None, typer.Option(help="Keep the video in this file [not kept].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Generate a video, ask the bundled model about it, and compare the answers with a full cache's.

    Exits with 1 if the answers are more than 5 points worse, or memory exceeded the cap.
    """
    with quick_imports():
        from tieredkv.demo.run import run
    passed = run(seed=seed, minutes=minutes, share=share, plot=plot, video_path=video, as_json=as_json)
    raise typer.Exit(0 if passed else 1)


def add_to(app: typer.Typer) -> None:
    app.command("demo", epilog="Example: tieredkv demo --plot where.png")(demo)
