"""The demo's picture: where in the video each answer's dynamic heads fetched from, and where the events were."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tieredkv.errors import OptionError
from tieredkv.tiny.scene import Scene

if TYPE_CHECKING:
    from tieredkv.demo import Answered

BIN_SECONDS = 4.0


def check_target(path: Path) -> None:
    """Raise `OptionError` if a picture cannot be drawn there, before minutes are spent on what it would show."""
    if find_spec("matplotlib") is None:
        raise OptionError("--plot needs matplotlib: pip install 'tieredkv[plot]'.")
    if path.suffix.lower() != ".png":
        raise OptionError(f"--plot {path}: give a file name that ends in .png.")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"--plot {path}: there is no folder {path.absolute().parent}.")


def fetch_times(answer: Answered, head_tokens: int, chunk_tokens: int, tokens_per_second: float) -> np.ndarray:
    """Middle, in seconds, of every chunk the answer's dynamic heads selected, once per selection."""
    starts = [s.first_token.flatten().numpy() for s in answer.tiered.trace or []]
    if not starts:
        return np.empty(0)
    return (np.concatenate(starts) + chunk_tokens / 2 - head_tokens) / tokens_per_second


def draw_fetches(
    scene: Scene,
    answers: list[Answered],
    head_tokens: int,
    tokens_per_second: float,
    path: Path,
    chunk_tokens: int = 32,
) -> None:
    """One row per question: selections per `BIN_SECONDS` as shade, the events its answer needs as marks.

    Written to `path` only when complete.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    edges = np.arange(0, scene.seconds + BIN_SECONDS, BIN_SECONDS)
    rows = []
    for answer in answers:
        counts, _ = np.histogram(fetch_times(answer, head_tokens, chunk_tokens, tokens_per_second), edges)
        rows.append(counts / max(1, counts.max()))
    figure, axes = plt.subplots(figsize=(11, 0.42 * len(answers) + 1.6), layout="constrained")
    image = axes.imshow(
        np.array(rows), aspect="auto", cmap="Blues", extent=(0, edges[-1], len(answers) - 0.5, -0.5), vmin=0, vmax=1
    )
    for card in scene.cards:
        axes.axvline((card.start_s + card.end_s) / 2, color="0.8", linewidth=0.6, zorder=1)
    for row, answer in enumerate(answers):
        times = sorted({(start + end) / 2 for start, end in answer.question.spans})
        axes.scatter(times, [row] * len(times), marker="o", s=46, facecolors="none", edgecolors="C3", linewidths=1.4)
    axes.set_yticks(range(len(answers)), [answer.question.text for answer in answers], fontsize=8)
    axes.set_xlim(0, scene.seconds)
    axes.set_xlabel("video time, s")
    axes.set_title("Where each answer's dynamic heads looked (shade), and the events it needed (circles)", fontsize=10)
    figure.colorbar(image, ax=axes, label="chunks selected, share of the row's most", pad=0.01)
    partial = path.with_name(path.name + ".part")
    figure.savefig(partial, dpi=130, format="png")
    plt.close(figure)
    partial.replace(path)
