"""tieredkv demo: the product, in two minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    seed: Annotated[int, typer.Option(min=0, help="Which video is made.")] = 1_000_000,
    minutes: Annotated[float, typer.Option(help="Length of the video.")] = 8.5,
    share: Annotated[float, typer.Option(help="Device memory, as a share of the full cache.")] = 0.1,
    plot: Annotated[Path | None, typer.Option(help="Draw where each answer looked, as PNG.")] = None,
    video: Annotated[Path | None, typer.Option(help="Keep the video here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Make a video, let the bundled trained model answer questions about it, and compare with a full cache.

    Exits with 1 if the answers are more than 5 points behind the full cache's, or the memory cap was passed.
    """
    from tieredkv.demo.run import run

    passed = run(seed=seed, minutes=minutes, share=share, plot=plot, video_path=video, as_json=as_json)
    raise typer.Exit(0 if passed else 1)


def add_to(app: typer.Typer) -> None:
    app.command("demo", epilog="Example: tieredkv demo --plot where.png")(demo)
