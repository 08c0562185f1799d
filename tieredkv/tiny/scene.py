"""Scenes: what a synthetic video shows and when, and questions about it with their true answers.

A card shows a shape (its key) in a colour, and a letter beside it. Letter i names shape i, so each card points to
another one, and the letters of a scene are chosen so that its cards form one cycle. A hop is one (letter, shape)
pair: the letter on the current shape's card, then the shape that this letter names.

The same arguments give the same pixels. Seeds from `EVALUATION_SEED` on are never used in training.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from tieredkv.tiny import draw
from tieredkv.tiny.bitmaps import COLOURS, LETTERS, SHAPES

SHAPE_NAMES, COLOUR_NAMES, LETTER_NAMES = tuple(SHAPES), tuple(COLOURS), tuple(LETTERS)
NAMED_BY = dict(zip(LETTER_NAMES, SHAPE_NAMES, strict=True))
"""Letter -> the shape it names, in every scene."""

FPS = 4.0
EVALUATION_SEED = 1_000_000
MAX_HOPS = 6


@dataclass(frozen=True)
class Card:
    """A card, on screen while `start_s <= t < end_s`. A distractor has no shape and no letter."""

    shape: str
    colour: str
    letter: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Scene:
    """One synthetic video, to be rendered. Cards are in order of appearance and never overlap in time."""

    seed: int
    seconds: float
    cards: tuple[Card, ...]
    distractors: tuple[Card, ...] = ()
    fps: float = FPS
    _by_shape: dict[str, Card] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_shape", {card.shape: card for card in self.cards})

    @property
    def frame_count(self) -> int:
        return round(self.seconds * self.fps)

    def card(self, shape: str) -> Card:
        """The card with this shape; `KeyError` if there is none."""
        return self._by_shape[shape]

    def render(self) -> Iterator[np.ndarray]:
        """Consecutive frames, a block `(n, 56, 56, 3)` uint8 per shot, `frame_count` frames in total."""
        shots = np.random.default_rng((self.seed, 1))
        stamps = self._stamps()
        start = 0
        while start < self.frame_count:
            length = min(round(shots.uniform(2, 12) * self.fps), self.frame_count - start)
            block = draw.background(shots, length)
            for frame in range(start, start + length):
                if frame in stamps:
                    draw.stamp(block[frame - start], *stamps[frame])
            yield block
            start += length

    def frames(self) -> np.ndarray:
        """All frames at once, `(frame_count, 56, 56, 3)` uint8."""
        return np.concatenate(list(self.render()))

    def _stamps(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Frame number -> the card picture on it and the picture's top left corner."""
        looks = np.random.default_rng((self.seed, 2))
        stamps = {}
        for card in self.cards + self.distractors:
            picture = draw.card(looks, card.shape, card.colour, card.letter)
            first, last = round(card.start_s * self.fps), round(card.end_s * self.fps)
            for frame, corner in zip(range(first, last), draw.path(looks, last - first), strict=True):
                stamps[frame] = picture, corner
        return stamps


def make_scene(seed: int, seconds: float, cards: int, distractors: int | None = None, fps: float = FPS) -> Scene:
    """A scene of `cards` cards with distinct shapes, whose letters form one cycle, at random times.

    `distractors` defaults to about one for every four cards. Raises `ValueError` when they do not fit.
    """
    if not 1 <= cards <= len(SHAPE_NAMES):
        raise ValueError(f"a scene has 1 to {len(SHAPE_NAMES)} cards, asked for {cards}")
    rng = np.random.default_rng((seed, 0))
    if distractors is None:
        distractors = cards // 4
    spans = deal_times(rng, cards + distractors, round(seconds * fps), fps)
    shapes = rng.permutation(len(SHAPE_NAMES))[:cards]
    dealt = [
        Card(
            SHAPE_NAMES[shape],
            str(rng.choice(COLOUR_NAMES)),
            LETTER_NAMES[following],
            *spans[i],
        )
        for i, (shape, following) in enumerate(zip(shapes, np.roll(shapes, -1), strict=True))
    ]
    noise = [Card("", str(rng.choice(COLOUR_NAMES)), "", *span) for span in spans[cards:]]
    return Scene(seed, seconds, tuple(sorted(dealt, key=lambda card: card.start_s)), tuple(noise), fps)


def deal_times(rng: np.random.Generator, count: int, frames: int, fps: float) -> list[tuple[float, float]]:
    """`count` spans (start, end), 1 to 1.5 s each, at least half a second apart, in random order."""
    lengths = np.round(rng.uniform(1, 1.5, count) * fps).astype(int)
    gap = round(fps / 2)
    slack = frames - lengths.sum() - gap * (count - 1)
    if slack < 0:
        raise ValueError(
            f"{count} cards need {frames - slack} frames, the scene has {frames}: fewer cards or more time"
        )
    free = np.sort(rng.integers(0, slack + 1, count))
    starts = free + np.concatenate([[0], np.cumsum(lengths[:-1] + gap)])
    spans = [(float(start / fps), float((start + length) / fps)) for start, length in zip(starts, lengths, strict=True)]
    return [spans[i] for i in rng.permutation(count)]


@dataclass(frozen=True)
class SceneQuestion:
    """A question, the words of its true answer, and for each word the seconds during which its card is visible."""

    text: str
    words: tuple[str, ...]
    kind: str
    spans: tuple[tuple[float, float], ...]


def colour_question(scene: Scene, shape: str) -> SceneQuestion:
    """`what colour was the star ?` -> one word."""
    card = scene.card(shape)
    return SceneQuestion(f"what colour was the {shape} ?", (card.colour,), "colour", ((card.start_s, card.end_s),))


def chain_question(scene: Scene, shape: str, hops: int) -> SceneQuestion:
    """`follow the star for 2 ?` -> `f heart k moon`: two words per hop, both read from the same card."""
    words: list[str] = []
    spans: list[tuple[float, float]] = []
    current = shape
    for _ in range(hops):
        card = scene.card(current)
        current = NAMED_BY[card.letter]
        words += [card.letter, current]
        spans += [(card.start_s, card.end_s)] * 2
    return SceneQuestion(f"follow the {shape} for {hops} ?", tuple(words), "chain", tuple(spans))


def questions(scene: Scene, seed: int, count: int = 8, max_hops: int = MAX_HOPS) -> list[SceneQuestion]:
    """`count` questions in random order: a third about colours, the others chains of 1 to `max_hops` hops.

    No chain has more hops than the scene has cards, so no answer can be continued by repeating its beginning.
    """
    rng = np.random.default_rng((seed, 3))
    max_hops = min(max_hops, len(scene.cards))
    selected = []
    for i in rng.permutation(count):
        shape = scene.cards[rng.integers(len(scene.cards))].shape
        if i % 3 == 0:
            selected.append(colour_question(scene, shape))
        else:
            selected.append(chain_question(scene, shape, int(rng.integers(1, max_hops + 1))))
    return selected
