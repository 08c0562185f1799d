"""The text of training conversations as token ids, and where the tokens of a video are."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tieredkv.tiny.encode import MERGE, SIDE, TOKENS

Tokenize = Callable[[str], tuple[int, ...]]
"""Token ids of a text, special tokens included."""


def tokenize_with(tokenizer: Any) -> Tokenize:
    """Remembers the ids of texts, most of which recur."""
    return lru_cache(maxsize=20_000)(lambda text: tuple(tokenizer(text).input_ids))


def head(tokenize: Tokenize) -> list[int]:
    """Everything before a video and its first vision token."""
    return [*tokenize("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")]


@dataclass(frozen=True)
class Place:
    """Where a video's tokens and the text after them are."""

    prefix: torch.Tensor  # (3, P) positions
    first: int  # position of the text after the prefix
    video_last: int | None
    """The video's largest position, if text is numbered as stock transformers numbers it for Qwen2.5-VL."""


class Prefix:
    """What precedes the conversations of a batch, for Qwen2.5-VL: the video's tokens in one run."""

    def __init__(self, tokenize: Tokenize, rng: np.random.Generator, steps: int) -> None:
        self._steps = steps
        self._start = len(head(tokenize)) + 1
        end = tokenize("<|vision_end|>")
        self.ids = [*head(tokenize), *tokenize("<|vision_start|>"), *tokenize("<|video_pad|>") * (steps * TOKENS), *end]

    def place(self, rng: np.random.Generator) -> Place:
        """At random: the video's largest position may or may not count for the text after it."""
        interval = float(rng.choice([2, rng.uniform(0.5, 4), 0], p=[0.75, 0.2, 0.05]))
        video = self._video(interval)
        kind = rng.choice(["stock", "next", "plain"], p=[0.45, 0.45, 0.1])
        last = int(video.max())
        first = last + 1 if kind == "next" else self._start + SIDE // MERGE
        before = torch.arange(self._start, device="cpu").expand(3, -1)
        positions = torch.cat([before, video, torch.full((3, 1), first, dtype=torch.long, device="cpu")], dim=1)
        return Place(positions, first + 1, last if kind == "stock" else None)

    def _video(self, interval: float) -> torch.Tensor:
        """(3, steps * 4) positions."""
        side = SIDE // MERGE
        axes = (torch.arange(size, device="cpu") for size in (self._steps, side, side))
        t, y, x = torch.meshgrid(*axes, indexing="ij")
        return torch.stack([(t * interval).long(), y, x]).flatten(1) + self._start


class TimedPrefix:
    """The same for Qwen3.5: a timestamp before each step, which is numbered as a picture.

    Half of the batches are written as the model's authors do, the others as transformers does, with vision tokens
    around the whole video as well. Three of four have the evaluation's frames per second.
    """

    def __init__(self, tokenize: Tokenize, rng: np.random.Generator, steps: int) -> None:
        outer = rng.random() < 0.5
        seconds = 0.5 if rng.random() < 0.75 else rng.uniform(0.2, 1.0)
        begin, end = tokenize("<|vision_start|>"), tokenize("<|vision_end|>")
        pictures = tokenize("<|video_pad|>") * TOKENS
        ids = [*head(tokenize), *(begin * outer)]
        for step in range(steps):
            ids += [*tokenize(f"<{(step + 0.25) * seconds:.1f} seconds>"), *begin, *pictures, *end]
        self.ids = [*ids, *(end * outer)]
        self._visual = torch.tensor(self.ids, dtype=torch.long, device="cpu") == pictures[0]

    def place(self, rng: np.random.Generator) -> Place:
        """There is one rule of positions."""
        side = SIDE // MERGE
        before = self._visual.cumsum(0) - self._visual.long()  # visual tokens before each token
        start = (
            torch.arange(len(self.ids), device="cpu") - before + before // TOKENS * side
        )  # of its picture; of text, its own
        within = before % TOKENS
        positions = torch.stack([start, start + within // side, start + within % side])
        return Place(positions, int(start[-1]) + 1, None)


AnyPrefix = Prefix | TimedPrefix
