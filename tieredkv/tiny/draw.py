"""Pixels: moving backgrounds and the cards stamped onto them, uint8 RGB, in plain numpy."""

import numpy as np

from tieredkv.tiny.bitmaps import COLOURS, LETTERS, SHAPES

SIZE = 56  # pixels per side of a frame
CARD_HEIGHT, CARD_WIDTH = 30, 48
_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


def background(rng: np.random.Generator, frames: int) -> np.ndarray:
    """One shot of a dim, half-desaturated, moving background: `(frames, SIZE, SIZE, 3)` uint8."""
    pattern = (_noise, _texture, _gradient, _stripes)[rng.integers(4)](rng, frames)
    base = _half_grey(rng.uniform(20, 115, 3))
    tint = _half_grey(rng.uniform(-45, 45, 3))
    return np.clip(base + pattern[..., None] * tint, 0, 255).astype(np.uint8)


def _half_grey(colour: np.ndarray) -> np.ndarray:
    return ((colour + colour.mean()) / 2).astype(np.float32)


def _noise(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Flicker in square cells, -1 .. 1."""
    cell = int(rng.choice([2, 4, 7, 14]))
    values = rng.random((frames, SIZE // cell, SIZE // cell), dtype=np.float32) * 2 - 1
    return values.repeat(cell, axis=1).repeat(cell, axis=2)


def _texture(rng: np.random.Generator, frames: int) -> np.ndarray:
    """A fixed random texture drifting past."""
    cell = int(rng.choice([4, 7, 8, 14]))
    coarse = rng.random((SIZE // cell, SIZE // cell), dtype=np.float32) * 2 - 1
    texture = coarse.repeat(cell, axis=0).repeat(cell, axis=1)
    dy, dx = rng.uniform(-3, 3, 2)
    return np.stack([np.roll(texture, (int(t * dy), int(t * dx)), (0, 1)) for t in range(frames)])


def _waves(rng: np.random.Generator, frames: int, low: float, high: float) -> np.ndarray:
    angle, frequency = rng.uniform(0, 2 * np.pi), rng.uniform(low, high) * 2 * np.pi / SIZE
    plane = (np.cos(angle) * _X + np.sin(angle) * _Y) * frequency
    phase = (rng.uniform(-0.8, 0.8) * np.arange(frames) + rng.uniform(0, 2 * np.pi)).astype(np.float32)
    return np.sin(plane.astype(np.float32) + phase[:, None, None])


def _gradient(rng: np.random.Generator, frames: int) -> np.ndarray:
    """One slow wave across the frame."""
    return _waves(rng, frames, 0.3, 1.0)


def _stripes(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Moving stripes with hard edges."""
    return np.sign(_waves(rng, frames, 2.0, 6.0))


def card(rng: np.random.Generator, shape: str, colour: str, letter: str) -> np.ndarray:
    """One card, `(CARD_HEIGHT, CARD_WIDTH, 3)` uint8: a dark panel, the shape in its colour, a white letter.

    An empty shape or letter is drawn as random pixels: a distractor that looks like a card and names nothing.
    """
    picture = np.empty((CARD_HEIGHT, CARD_WIDTH, 3), np.float32)
    picture[:] = rng.uniform(95, 190)
    picture[1:-1, 1:-1] = rng.uniform(8, 45)
    bits = SHAPES[shape] if shape else rng.random((11, 11)) < 0.5
    picture[4:26, 3:25][bits.repeat(2, 0).repeat(2, 1)] = np.array(COLOURS[colour]) + rng.uniform(-12, 12, 3)
    bits = LETTERS[letter] if letter else rng.random((7, 5)) < 0.5
    picture[5:26, 29:44][bits.repeat(3, 0).repeat(3, 1)] = rng.uniform(215, 255)
    return np.clip(picture, 0, 255).astype(np.uint8)


def path(rng: np.random.Generator, frames: int) -> np.ndarray:
    """A card's top left corner in each frame: `(frames, 2)` integers (y, x), drifting, with the card inside."""
    room = np.array([SIZE - CARD_HEIGHT, SIZE - CARD_WIDTH])
    start, speed = rng.uniform(0, 1, 2) * room, rng.uniform(-1.5, 1.5, 2)
    return np.clip(start + speed * np.arange(frames)[:, None], 0, room).astype(int)


def stamp(frame: np.ndarray, picture: np.ndarray, corner: np.ndarray) -> None:
    """Draw a card onto one frame, in place."""
    y, x = corner
    frame[y : y + CARD_HEIGHT, x : x + CARD_WIDTH] = picture
