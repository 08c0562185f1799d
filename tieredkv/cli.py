"""The command line: answers on stdout, everything else on stderr; exit code 0, 1 (a check failed) or 2 (bad input)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tieredkv import __version__
from tieredkv.errors import OptionError, SessionError, TieredKVError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__
)

# Options that commands share.
Model = Annotated[str, typer.Option("--model", "-m", help="A local path, a hub id, or 'tiny'.")]
HostGiB = Annotated[float | None, typer.Option(help="Host memory for keys and values, GiB.")]
Fps = Annotated[float | None, typer.Option(help="Frames sampled per second.")]
MaxFrames = Annotated[int | None, typer.Option(help="Spread at most this many frames.")]
Start = Annotated[float | None, typer.Option(help="Second of the video to start at.")]
End = Annotated[float | None, typer.Option(help="Second of the video to end at.")]
PolicyName = Annotated[str | None, typer.Option("--policy", help="One of `tieredkv policies` [hybridkv].")]
NewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]


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
    words: Annotated[list[str], typer.Argument(metavar="[VIDEO] QUESTION", help="A video file, and what to ask.")],
    model: Model = "tiny",
    session: Annotated[
        Path | None, typer.Option(help="Ask this saved session; if there is no such file, save one.")
    ] = None,
    gpu_kv_gb: Annotated[float | None, typer.Option(help="Device memory for keys and values, GiB [4].")] = None,
    host_kv_gb: HostGiB = None,
    policy: PolicyName = None,
    fps: Fps = None,
    max_frames: MaxFrames = None,
    start: Start = None,
    end: End = None,
    max_new_tokens: NewTokens = 256,
    evidence: Annotated[
        Path | None, typer.Option(help="Write which moments were looked at here, as PNG or HTML.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print answer and statistics as JSON.")] = False,
) -> None:
    """Answer one question about one video, or about a saved session.

    Example: tieredkv ask film.mp4 "What is on the table?" -m Qwen/Qwen2.5-VL-3B-Instruct --session film.tkv
    """
    from tieredkv import api, evidence_page, storage
    from tieredkv.tiny.model import PATH

    *videos, question = words
    if len(videos) > 1:
        raise OptionError(f"ask takes one video and one question, got {len(words)} words: put quotes around each.")
    if evidence is not None:
        evidence_page.check_target(evidence)
    given = {"gpu_kv_gb": gpu_kv_gb, "host_kv_gb": host_kv_gb, "policy": policy}
    tiers: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    sampling = {"fps": fps, "max_frames": max_frames, "start": start, "end": end}
    source: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
    where = PATH if model == "tiny" else model
    asked: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    unsaved: SessionError | None = None
    if session is not None and _is_there(session):
        if source:
            option = next(iter(source)).replace("_", "-")
            raise OptionError(f"{session} is saved as it was sampled: leave out --{option}.")
        api.check_question(question, asked)
        with api.load_session(session, where, video=videos[0] if videos else None, **tiers) as opened:
            answer = opened.ask(question, **asked)
    elif not videos:
        missing = "give a video and a question" if session is None else f"{session}: no such file; give a video too"
        raise OptionError(f"there is no video to ask about: {missing}.")
    elif session is None:
        answer = api.generate(where, videos[0], question, progress=True, **asked, **tiers, **source)
    else:
        api.check_question(question, asked)
        storage.check_target(session)
        with api.new_session(where, progress=True, **tiers) as opened:
            opened.ingest(videos[0], question=question, **asked, **source)
            try:
                if _is_there(session):
                    raise SessionError(f"{session} was written by somebody else meanwhile: not saved over it.")
                opened.save(session)
            except SessionError as error:  # what was ingested is worth an answer all the same
                unsaved = error
            answer = opened.ask(question, **asked)
    if as_json:
        moments = [moment.as_dict() for moment in answer.evidence or ()]
        said = {"text": answer.text, "token_ids": answer.token_ids, "evidence": moments}
        typer.echo(json.dumps({**said, **answer.stats.as_dict()}))
    else:
        typer.echo(answer.text)
    if evidence is not None:
        evidence_page.save_evidence(answer, evidence, question=question, video=videos[0] if videos else None)
    if unsaved is not None:
        raise unsaved


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise OptionError(f"{str(path)[:80]}: not a file name ({error.strerror}).") from None


@app.command()
def plan(
    video: Annotated[str, typer.Argument(help="A video file, or a whole number of visual tokens.")],
    model: Model = "tiny",
    gpu_kv_gb: Annotated[float, typer.Option(help="Device memory for keys and values, GiB.")] = 4.0,
    host_kv_gb: HostGiB = None,
    policy: PolicyName = None,
    fps: Fps = None,
    max_frames: MaxFrames = None,
    start: Start = None,
    end: End = None,
    max_new_tokens: NewTokens = 256,
    link: Annotated[str, typer.Option(help="Bus to the card, or its GB/s.")] = "pcie4x16",
    card: Annotated[str | None, typer.Option(help="As 'RTX 4090', or GB/s of its memory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a video would take of both memory tiers. Loads no weights and decodes nothing."""
    from tieredkv import planner
    from tieredkv.tiny.model import PATH

    changed: dict[str, Any] = {} if policy is None else {"policy": policy}
    tokens = video.isascii() and video.isdigit() and len(video) < 20 and not Path(video).exists()
    made = planner.plan(
        PATH if model == "tiny" else model,
        int(video) if tokens else video,
        gpu_kv_gb=gpu_kv_gb,
        host_kv_gb=host_kv_gb,
        **changed,
        fps=fps,
        max_frames=max_frames,
        start=start or 0.0,
        end=end,
        max_new_tokens=max_new_tokens,
        link=link,
        card=card,
    )
    typer.echo(json.dumps(made.as_dict()) if as_json else str(made))


@app.command()
def policies(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List what --policy and TierConfig(policy=...) may name, each in a paragraph with its source."""
    import textwrap

    from tieredkv.policy.presets import POLICIES

    if as_json:
        made = {name: {"source": one.source, "summary": one.summary} for name, one in POLICIES.items()}
        typer.echo(json.dumps(made))
        return
    for name, one in POLICIES.items():
        typer.echo(f"{name}  ({one.source})")
        typer.echo(textwrap.indent(textwrap.fill(one.summary, 100), "    ") + "\n")


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
    except SystemExit as stop:
        if stop.code == 130:  # how typer ends on an interrupt
            print("tieredkv: interrupted.", file=sys.stderr)
        raise
