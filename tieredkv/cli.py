"""The command line: answers on stdout, everything else on stderr; exit code 0, 1 (a check failed) or 2 (bad input)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from tieredkv import __version__
from tieredkv.errors import TieredKVError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Long-video question answering with the key/value cache in two memory tiers."""


@app.command()
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
    from tieredkv.demo import run

    passed = run(seed=seed, minutes=minutes, share=share, plot=plot, video_path=video, as_json=as_json)
    raise typer.Exit(0 if passed else 1)


@app.command()
def ask(
    video: Annotated[Path, typer.Argument(help="A video file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A local path, a hub id, or 'tiny'.")] = "tiny",
    gpu_kv_gb: Annotated[float, typer.Option(help="Device memory for keys and values, GiB.")] = 4.0,
    fps: Annotated[float | None, typer.Option(help="Frames sampled per second.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="Sample at most this many frames.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print answer and statistics as JSON.")] = False,
) -> None:
    """Answer one question about one video.

    Example: tieredkv ask film.mp4 "What is on the table?" -m Qwen/Qwen2.5-VL-3B-Instruct --gpu-kv-gb 2
    """
    from tieredkv.api import generate
    from tieredkv.tiny.model import PATH

    answer = generate(
        PATH if model == "tiny" else model,
        video,
        question,
        gpu_kv_gb=gpu_kv_gb,
        fps=fps,
        max_frames=max_frames,
        max_new_tokens=max_new_tokens,
        progress=True,
    )
    if as_json:
        typer.echo(json.dumps({"text": answer.text, "token_ids": answer.token_ids, **answer.stats.as_dict()}))
    else:
        typer.echo(answer.text)


def main() -> None:
    """Entry point: an error the user can mend is one sentence on stderr and exit code 2."""
    try:
        app()
    except TieredKVError as error:
        print(f"tieredkv: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("tieredkv: interrupted.", file=sys.stderr)
        sys.exit(130)
