"""Videos for training the decoder, spliced from features, so that the frozen vision tower encodes each clip once.

Grid steps do not attend to each other in the vision tower, so a card's features can be moved to another video.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tieredkv.tiny.encode import encode, to_pairs, to_patches
from tieredkv.tiny.scene import COLOUR_NAMES, FPS, LETTER_NAMES, NAMED_BY, SHAPE_NAMES, Card, Scene, deal_times
from tieredkv.tiny.train_vision import blemish, card_steps, crowded_scene


@dataclass(frozen=True)
class Clip:
    """One card in the features: grid steps `first` to `last`, `last` excluded."""

    first: int
    last: int
    colour: str


@dataclass(frozen=True)
class Video:
    """A spliced video: features (T, 4, hidden), and the (colour, letter) shown with each shape on its cards."""

    features: torch.Tensor
    cards: dict[str, tuple[str, str]]


class Clips:
    """A stock of encoded cards and backgrounds from which `splice` composes videos."""

    @torch.no_grad()
    def __init__(self, model: Any, seed: int, crowded: int = 340, empty: int = 60) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.cards: dict[tuple[str, str], list[Clip]] = {}
        parts, offset = [], 0
        scenes = [crowded_scene(seed + i) for i in range(crowded)]
        scenes += [_empty_scene(seed + crowded + i) for i in range(empty)]
        for number, scene in enumerate(scenes):
            if number == crowded:
                self.background = offset
            for card in scene.cards:
                steps = card_steps(card)
                clip = Clip(offset + steps.start, offset + steps.stop, card.colour)
                self.cards.setdefault((card.shape, card.letter), []).append(clip)
            patches = to_patches(_some_blemished(to_pairs(scene.frames()), generator)).to(model.device)
            with torch.autocast(model.device.type, torch.bfloat16):
                parts.append(encode(model.model.visual, patches).bfloat16())
            offset += len(parts[-1])
        self.features = torch.cat(parts)

    def splice(self, rng: np.random.Generator, steps: int, cards: int, random_letters: bool = False) -> Video:
        """A video of `steps` grid steps with `cards` cards, whose letters form one cycle over its shapes.

        With `random_letters` the letters are random, and may name a shape that is not in the video.
        """
        shapes = [SHAPE_NAMES[i] for i in rng.permutation(len(SHAPE_NAMES))[:cards]]
        names = dict(zip(NAMED_BY.values(), NAMED_BY, strict=True))
        letters = [names[shape] for shape in shapes[1:] + shapes[:1]]
        if random_letters:
            letters = [str(letter) for letter in rng.choice(LETTER_NAMES, cards)]
        clips = []
        for shape, letter in zip(shapes, letters, strict=True):
            stock = self.cards[shape, letter]
            clips.append(stock[rng.integers(len(stock))])
        features = self._backgrounds(rng, steps)
        slack = steps - sum(clip.last - clip.first for clip in clips)
        if slack < 0:
            raise ValueError(f"{cards} cards do not fit {steps} grid steps")
        at, before = np.sort(rng.integers(0, slack + 1, cards)), 0
        for start, i in zip(at, rng.permutation(cards), strict=True):
            clip = clips[i]
            size = clip.last - clip.first
            features[start + before : start + before + size] = self.features[clip.first : clip.last]
            before += size
        return Video(
            features,
            {shape: (clip.colour, letter) for shape, clip, letter in zip(shapes, clips, letters, strict=True)},
        )

    def _backgrounds(self, rng: np.random.Generator, steps: int) -> torch.Tensor:
        runs, length = [], 0
        while length < steps:
            size = min(int(rng.integers(8, 100)), steps - length)
            start = int(rng.integers(self.background, len(self.features) - size))
            runs.append(self.features[start : start + size])
            length += size
        return torch.cat(runs)


def _empty_scene(seed: int, seconds: float = 128.0) -> Scene:
    """Backgrounds and a few distractors, no cards."""
    rng = np.random.default_rng((seed, 5))
    spans = deal_times(rng, int(rng.integers(0, 8)), round(seconds * FPS), FPS)
    return Scene(seed, seconds, (), tuple(Card("", str(rng.choice(COLOUR_NAMES)), "", *span) for span in spans))


def _some_blemished(pairs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`blemish` a random half: it changes the first half of a batch, so shuffle, blemish, and restore the order."""
    order = torch.randperm(len(pairs), generator=generator)
    return blemish(pairs[order], generator)[order.argsort()]
