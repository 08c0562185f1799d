"""The demo's picture: which parts of the video each answer's dynamic heads selected, and where the events were."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tieredkv.demo.answers import ComparedAnswer
from tieredkv.errors import OptionError
from tieredkv.storage.atomic import replace_file
from tieredkv.tiny.scene import Scene


def check_plot(path: Path) -> None:
    """Raise `OptionError` if a picture cannot be drawn, before the demo spends minutes."""
    if find_spec("matplotlib") is None:
        raise OptionError("--plot needs matplotlib: pip install 'tieredkv[plot]'.")
    if path.suffix.lower() != ".png":
        raise OptionError(f"--plot {path}: give a file name that ends in .png.")


def selections_per_chunk(answer: ComparedAnswer, chunks: int, chunk_tokens: int) -> np.ndarray:
    """How often the answer's dynamic heads selected each of the prompt's chunks: `(chunks,)`, over steps and heads.

    Each was copied from host memory at least once for this answer, as the pool starts empty.
    """
    starts = [s.first_token[s.first_token >= 0].numpy() for s in answer.tiered.trace or []]
    picked = np.concatenate(starts) // chunk_tokens if starts else np.empty(0, int)
    return np.bincount(picked, minlength=chunks)[:chunks]


def draw_fetches(
    scene: Scene,
    answers: list[ComparedAnswer],
    head_tokens: int,
    tokens_per_second: float,
    path: Path,
    chunk_tokens: int = 32,
) -> None:
    """Draw one row per question: how often each chunk was selected as shade, the events its answer needs as circles.

    head_tokens: prompt tokens before the first visual one, so that chunks are drawn where their frames are. Raises
    `OutputError` if `path` cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chunks = int((head_tokens + scene.seconds * tokens_per_second) // chunk_tokens) + 1
    start, end = ((edge - head_tokens) / tokens_per_second for edge in (0, chunks * chunk_tokens))
    rows = []
    for answer in answers:
        counts = selections_per_chunk(answer, chunks, chunk_tokens)
        rows.append(counts / max(1, counts.max()))
    figure, axes = plt.subplots(figsize=(11, 0.42 * len(answers) + 1.6), layout="constrained")
    image = axes.imshow(
        np.array(rows), aspect="auto", cmap="Blues", extent=(start, end, len(answers) - 0.5, -0.5), vmin=0, vmax=1
    )
    middles = [(card.start_s + card.end_s) / 2 for card in scene.cards]
    axes.scatter(middles, [-0.72] * len(middles), marker="v", s=22, color="C3", clip_on=False)
    for row, answer in enumerate(answers):
        times = sorted({(start + end) / 2 for start, end in answer.question.spans})
        axes.scatter(times, [row] * len(times), marker="o", s=46, facecolors="none", edgecolors="C3", linewidths=1.4)
    axes.set_yticks(range(len(answers)), [answer.question.text for answer in answers], fontsize=8)
    axes.set_xlim(0, scene.seconds)
    axes.set_ylim(len(answers) - 0.5, -0.5)
    axes.set_xlabel("video time, s")
    axes.set_title(
        "Chunks that each answer's dynamic heads selected (shade), the events of the video (triangles), "
        "those the answer needed (circles)",
        fontsize=9,
        pad=20,
    )
    figure.colorbar(image, ax=axes, label="times selected, relative to the row's maximum", pad=0.01)
    try:
        with replace_file(path) as part:
            figure.savefig(part, dpi=130, format="png")
    finally:
        plt.close(figure)
