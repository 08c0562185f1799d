"""The film that the bundled toy model knows, for a server without a model."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tieredkv.serve.health import Demo
from tieredkv.serve.media.library import Library
from tieredkv.tiny.scene import make_scene, questions
from tieredkv.tiny.video import write_video

SEED = 1_000_000
SECONDS, CARDS = 120, 6
"""Short enough to be written and ingested in seconds."""
NAME = "demo.mp4"
QUESTIONS = 4


def add_demo(library: Library) -> Demo:
    """Write the film and put it among the uploads, for good. Blocks."""
    scene = make_scene(SEED, SECONDS, CARDS)
    with tempfile.TemporaryDirectory(prefix="tieredkv-demo-") as folder:
        library.add(write_video(scene, Path(folder) / NAME), NAME)
    (entry,) = (entry for entry in library.store.uploads("") if entry.permanent)
    texts = dict.fromkeys(question.text for question in questions(scene, SEED, 4 * QUESTIONS))
    return Demo(entry.id, tuple(texts)[:QUESTIONS])
