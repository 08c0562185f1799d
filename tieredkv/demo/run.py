"""The demo: a generated video, the bundled model, the same questions through tiered memory and through a full cache."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from tieredkv.api import open_session
from tieredkv.config import TierConfig
from tieredkv.demo.answers import ComparedAnswer
from tieredkv.demo.full_cache import ask_stock
from tieredkv.demo.report import print_table, summarize
from tieredkv.errors import OptionError
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import model_shape
from tieredkv.planning.admission import smallest_cap_bytes
from tieredkv.planning.sizes import lay_out
from tieredkv.progress import progress_bar
from tieredkv.storage import atomic
from tieredkv.storage.json_text import print_json
from tieredkv.tiny import model as tiny
from tieredkv.tiny.evaluate import TOKENS_PER_SECOND
from tieredkv.tiny.scene import make_scene, questions
from tieredkv.tiny.video import write_video
from tieredkv.video.frames import load_frames
from tieredkv.video.sampling import Sampling

QUESTIONS = 12
CARDS = 12
MOST_POINTS_LOST = 5.0
"""Percentage points of right words by which tiered memory may be worse than the full cache."""


def run(seed: int, minutes: float, share: float, plot: Path | None, video_path: Path | None, as_json: bool) -> bool:
    """Run and print the demo; returns whether the answers were good enough and the cap held.

    Raises `OptionError` for bad input, `OutputError` for a file that cannot be written.
    """
    started = time.perf_counter()
    _check(minutes, share, plot, video_path)
    console = Console(highlight=False)
    scene = make_scene(seed, round(minutes * 60), CARDS)
    selected = list({question.text: question for question in questions(scene, seed, QUESTIONS)}.values())
    longest = max(len(question.words) for question in selected) + 1
    _check_share(share, minutes, round(scene.seconds * TOKENS_PER_SECOND), longest)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.mp4" if video_path is None else video_path
        with progress_bar("write", " frames") as bar:
            write_video(scene, path, bar)
        if not as_json:
            console.print(
                f"{minutes:g} minutes of video, {CARDS} events of 1 to 1.5 s hidden in it. Loading the model."
            )
        model, processor = tiny.load()
        shape = model_shape(model.config, model.dtype)
        cap_gib = share * scene.seconds * TOKENS_PER_SECOND * shape.token_bytes / GIB
        with open_session(model, path, gpu_kv_gb=cap_gib, processor=processor, fps=tiny.FPS, progress=True) as session:
            assert session.video is not None
            head, encoded, family = session.head_tokens, session.video, session.family
            tiered = [session.ask(q.text, max_new_tokens=longest, trace=plot is not None) for q in selected]
        frames = load_frames(path, Sampling(tiny.FPS))
        full = [ask_stock(model, processor, family, frames, encoded, question.text, longest) for question in selected]
    answers = [ComparedAnswer(*row) for row in zip(selected, tiered, full, strict=True)]
    report = summarize(answers, time.perf_counter() - started)
    if not as_json:
        print_table(console, answers, report)
    if plot is not None:
        from tieredkv.demo.plot import draw_fetches

        draw_fetches(scene, answers, head, TOKENS_PER_SECOND, plot)
        if not as_json:
            console.print(f"Wrote {plot}.")
    print_json(report)
    lost = 100 * (report["accuracy_full"] - report["accuracy_tiered"])
    return lost <= MOST_POINTS_LOST and report["kv_device_peak_bytes"] <= report["kv_cap_bytes"]


def _check(minutes: float, share: float, plot: Path | None, video_path: Path | None) -> None:
    if not 1 <= minutes <= 20:
        raise OptionError(f"--minutes {minutes:g} is not valid: give 1 to 20, which the tiny model was trained for.")
    if not 0 < share <= 1:
        raise OptionError(f"--share {share:g} is not valid: give a share of the full cache above 0 and at most 1.")
    if plot is not None:
        from tieredkv.demo.plot import check_plot

        check_plot(plot)
    for path in (plot, video_path):
        if path is not None:
            atomic.check_target(path)


def _check_share(share: float, minutes: float, visual: int, longest: int) -> None:
    """Raise `OptionError` for a share too small for the fixed costs of a video this short, before it is generated.

    visual: tokens of the video. longest: tokens of the longest answer.
    """
    shape = model_shape(tiny.build_config(), torch.float32)
    full, text = visual * shape.token_bytes, 64  # more than the tokens around the video
    layout = lay_out(TierConfig(), visual + text, text, longest)
    needed = smallest_cap_bytes(shape, TierConfig(), layout, text)
    if share * full < needed:
        raise OptionError(
            f"--share {share:g} is too small for a video of {minutes:g} minutes, where fixed costs weigh more: "
            f"give {math.ceil(100 * needed / full) / 100:g} or more, or more --minutes."
        )
