"""The demo: a generated video, a trained model, the same questions through tiered memory and through a full cache.

Both are given the same position ids, so that the two answers differ by the cache alone.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tieredkv.api import open_session
from tieredkv.config import TierConfig
from tieredkv.errors import OptionError
from tieredkv.memory.units import GIB
from tieredkv.models.families.base import VideoFamily, VideoGrid
from tieredkv.models.kv_shape import model_shape
from tieredkv.planning import sizes
from tieredkv.progress import progress_bar
from tieredkv.session.results import Generation
from tieredkv.tiny import model as tiny
from tieredkv.tiny.evaluate import TOKENS_PER_SECOND, prepare
from tieredkv.tiny.scene import Question, make_scene, questions
from tieredkv.tiny.video import write_video
from tieredkv.video.frames import Frames, Sampling, load_frames

QUESTIONS = 12
CARDS = 12
MOST_POINTS_BEHIND = 5.0


@dataclass(frozen=True, slots=True)
class Answered:
    """One question, answered twice."""

    question: Question
    tiered: Generation
    full: str


def right_words(question: Question, answer: str) -> int:
    """Words of the answer that are right in their place."""
    return sum(a == b for a, b in zip(question.words, answer.split(), strict=False))


def right_hops(question: Question, answer: str) -> int:
    """Hops of a chain, each a letter and a shape, with both words right in their place."""
    words = answer.split()[: len(question.words)]
    right = [a == b for a, b in zip(question.words, words, strict=False)]
    right += [False] * (len(question.words) - len(right))
    return sum(a and b for a, b in zip(right[::2], right[1::2], strict=True))


def run(seed: int, minutes: float, share: float, plot: Path | None, video_path: Path | None, as_json: bool) -> bool:
    """Run the demo and print it; whether the answers held up and the cap held. Raises `OptionError` for bad input."""
    started = time.perf_counter()
    _check(minutes, share, plot, video_path)
    console = Console(highlight=False)
    scene = make_scene(seed, round(minutes * 60), CARDS)
    asked = list({question.text: question for question in questions(scene, seed, QUESTIONS)}.values())
    longest = max(len(question.words) for question in asked) + 1
    _check_share(share, minutes, round(scene.seconds * TOKENS_PER_SECOND), longest)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.mp4" if video_path is None else video_path
        with progress_bar("write", " frames") as bar, _writing(path):
            write_video(scene, path, bar)
        if not as_json:
            console.print(
                f"{minutes:g} minutes of video, {CARDS} events of 1 to 1.5 s hidden in it. Loading the model."
            )
        model, processor = tiny.load()
        shape = model_shape(model.config, model.dtype)
        cap = int(share * scene.seconds * TOKENS_PER_SECOND * shape.token_bytes)
        with open_session(
            model, path, gpu_kv_gb=cap / GIB, processor=processor, fps=tiny.FPS, progress=True
        ) as session:
            assert session.video is not None
            head, encoded, family = session.head_tokens, session.video, session.family
            tiered = [session.ask(q.text, max_new_tokens=longest, trace=plot is not None) for q in asked]
        frames = load_frames(path, Sampling(tiny.FPS))
        full = [ask_stock(model, processor, family, frames, encoded, question.text, longest) for question in asked]
    answers = [Answered(*row) for row in zip(asked, tiered, full, strict=True)]
    report = summarize(answers, time.perf_counter() - started)
    if not as_json:
        _print_table(console, answers, report)
    if plot is not None:
        from tieredkv.demo.plot import draw_fetches

        with _writing(plot):
            draw_fetches(scene, answers, head, TOKENS_PER_SECOND, plot)
        if not as_json:
            console.print(f"Wrote {plot}.")
    print(json.dumps(report))
    behind = 100 * (report["accuracy_full"] - report["accuracy_tiered"])
    return behind <= MOST_POINTS_BEHIND and report["kv_device_peak_bytes"] <= report["kv_cap_bytes"]


def _check(minutes: float, share: float, plot: Path | None, video_path: Path | None) -> None:
    if not 1 <= minutes <= 20:
        raise OptionError(f"--minutes {minutes:g} is not valid: give 1 to 20, what the tiny model was trained for.")
    if not 0 < share <= 1:
        raise OptionError(f"--share {share:g} is not valid: give a share of the full cache above 0 and at most 1.")
    if plot is not None:
        from tieredkv.demo.plot import check_plot

        check_plot(plot)
    for name, path in (("--plot", plot), ("--video", video_path)):
        if path is not None and not path.absolute().parent.is_dir():
            raise OptionError(f"{name} {path}: there is no folder {path.absolute().parent}.")
        if path is not None and path.is_dir():
            raise OptionError(f"{name} {path} is a folder: give a file name.")


def _check_share(share: float, minutes: float, visual: int, longest: int) -> None:
    """Raise `OptionError` for a share that cannot hold what a video this short needs, before the video is made."""
    shape = model_shape(tiny.build_config(), torch.float32)
    full, text = visual * shape.token_bytes, 64  # tokens around the video are fewer
    layout = sizes.lay_out(TierConfig(), visual + text, text, longest)
    needed = sizes.smallest_cap_bytes(shape, TierConfig(), layout, text)
    if share * full < needed:
        raise OptionError(
            f"--share {share:g} is too small for a video of {minutes:g} minutes, where fixed costs weigh more: "
            f"give {math.ceil(100 * needed / full) / 100:g} or more, or more --minutes."
        )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a folder that may not be written to into one sentence."""
    try:
        yield
    except OSError as error:
        raise OptionError(f"{path}: cannot be written ({error.strerror or error}).") from None


@torch.no_grad()
def ask_stock(
    model: Any, processor: Any, family: VideoFamily, frames: Frames, video: VideoGrid, text: str, max_new_tokens: int
) -> str:
    """The answer of transformers' own `generate` with its full cache, everything from scratch but the positions."""
    inputs = prepare(processor, frames.pixels, text, frames.fps)
    visual = (inputs["mm_token_type_ids"][0] == 2).nonzero().squeeze(1)
    head, total = int(visual[0]), inputs["input_ids"].shape[1]
    positions = family.positions(model, head, video, 0, total, "published")
    ids = model.generate(**inputs, position_ids=positions.unsqueeze(1), max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.decode(ids[0, total:], skip_special_tokens=True).strip()


def summarize(answers: list[Answered], seconds: float) -> dict[str, Any]:
    """The demo's JSON object. Bytes of the full cache and of the host tier are those of the longest question."""
    stats = [answer.tiered.stats for answer in answers]
    words = sum(len(answer.question.words) for answer in answers)
    chains = [answer for answer in answers if answer.question.kind == "chain"]
    hops = sum(len(answer.question.words) // 2 for answer in chains)
    selected = sum(s.selected_chunks for s in stats)
    resident = sum((s.hit_rate or 0.0) * s.selected_chunks for s in stats)
    return {
        "questions": len(answers),
        "visual_tokens": stats[0].visual_tokens,
        "accuracy_tiered": sum(right_words(a.question, a.tiered.text) for a in answers) / words,
        "accuracy_full": sum(right_words(a.question, a.full) for a in answers) / words,
        "hop_accuracy_tiered": sum(right_hops(a.question, a.tiered.text) for a in chains) / hops if hops else None,
        "hop_accuracy_full": sum(right_hops(a.question, a.full) for a in chains) / hops if hops else None,
        "kv_full_bytes": max(s.kv_full_bytes for s in stats),
        "kv_cap_bytes": stats[0].kv_cap_bytes,
        "kv_device_peak_bytes": max(s.kv_device_peak_bytes for s in stats),
        "kv_host_bytes": max(s.kv_host_bytes for s in stats),
        "static_heads": round(fmean(s.static_heads for s in stats), 2),
        "dynamic_heads": round(fmean(s.dynamic_heads for s in stats), 2),
        "hit_rate": resident / selected if selected else None,
        "moved_bytes": sum(s.moved_bytes for s in stats),
        "ingest_s": round(stats[0].ingest_s, 3),
        "ttft_s": round(fmean(s.ttft_s for s in stats), 4),
        "tpot_ms": round(fmean(s.tpot_ms for s in stats if s.tpot_ms is not None), 3),
        "seconds": round(seconds, 2),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("tieredkv", "torch", "transformers", "av")},
        },
    }


def _print_table(console: Console, answers: list[Answered], report: dict[str, Any]) -> None:
    table = Table(title="The same questions through tiered memory and through a full cache")
    for column in ("question", "truth", "tiered", "full cache"):
        table.add_column(column, overflow="fold")
    for answer in answers:
        truth = " ".join(answer.question.words)
        cells = [
            text if text == truth else f"[red]{text or '(nothing)'}[/red]" for text in (answer.tiered.text, answer.full)
        ]
        table.add_row(answer.question.text, truth, *cells)
    console.print(table)
    full, peak, cap = (report[name] for name in ("kv_full_bytes", "kv_device_peak_bytes", "kv_cap_bytes"))
    hops = [report["hop_accuracy_tiered"], report["hop_accuracy_full"]]
    lines = [
        f"words right      tiered {report['accuracy_tiered']:.1%}, full cache {report['accuracy_full']:.1%}",
        f"hops right       tiered {hops[0]:.1%}, full cache {hops[1]:.1%}" if None not in hops else "",
        f"KV on the device {peak:,} bytes at most, of {cap:,} allowed; a full cache takes {full:,} ({peak / full:.1%})",
        f"KV on the host   {report['kv_host_bytes']:,} bytes, {report['visual_tokens']:,} visual tokens",
        f"heads            {report['static_heads']:g} static, {report['dynamic_heads']:g} dynamic, mean per question",
        f"moved            {report['moved_bytes']:,} bytes host to device in all",
        f"time             ingest {report['ingest_s']:.1f} s, first token {report['ttft_s'] * 1000:.0f} ms, "
        f"then {report['tpot_ms']:.1f} ms per token, {report['seconds']:.0f} s in all",
    ]
    if report["hit_rate"] is not None:
        lines.insert(5, f"hit rate         {report['hit_rate']:.1%} of the selected chunks were on the device already")
    console.print("\n".join(line for line in lines if line))
