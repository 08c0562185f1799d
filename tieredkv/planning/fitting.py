"""The frame rate and the frame size with which a film fits: for `fit=True`, and for refusals, which name them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tieredkv.errors import OptionError
from tieredkv.memory.units import largest
from tieredkv.models.chat_template import ChatTemplate
from tieredkv.models.families.base import TooFewPixels, VideoGrid
from tieredkv.video.frames import Sampled
from tieredkv.video.sampling import Sampling

GOOD_RATE, GOOD_PIXELS = 1.0, 448 * 252
"""A frame a second, of a size at which people, things and large captions can be told apart."""
LEAST_RATE, SMALL_PIXELS = 0.1, 280 * 168
"""A frame in ten seconds, of half of those pixels: a film that needs less is refused."""
ONE_VIDEO = "fit=True is for one video: give fps and max_pixels for several, and for pictures."
"""Why `fit` is refused."""
RULE = (("rate", GOOD_RATE), ("size", GOOD_PIXELS), ("rate", LEAST_RATE), ("size", SMALL_PIXELS))
"""What is lowered, in this order, each as far as is stated before the next is (ours). Frames shrink before there are
fewer than one a second, as in the reference code of Qwen's models (qwen-vl-utils): it gives the frames of a long video
even shares of a number of pixels, but at least 128 x 28 x 28 each."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A rate and a frame size."""

    fps: float
    max_pixels: int | None
    """None: the limits of the model's processor."""


@dataclass(frozen=True)
class Film:
    """A video that is opened but not decoded, and the tokens that it has at other rates and frame sizes."""

    template: ChatTemplate
    config: Any
    """The model's."""
    sampling: Sampling
    """As asked for; the rate is given, or the processor's."""
    sampled: Sampled
    """What `sampling` takes of the video."""
    around: Callable[[Sampled, VideoGrid], int]
    """Returns the prompt's tokens before and after the video."""
    _texts: dict[float, int] = field(default_factory=dict)
    """Tokens of all text in the prompt by rate, but for the text inside steps."""
    _grids: dict[int, VideoGrid] = field(default_factory=dict)
    """By `max_pixels`, of some number of frames."""

    @property
    def asked(self) -> Choice:
        """The rate and the size that were asked for."""
        assert self.sampling.fps is not None
        return Choice(self.sampling.fps, self.sampling.max_pixels)

    def at(self, choice: Choice) -> Sampled:
        """What is taken of the video: at other rates as many frames as the source would give, or one more."""
        if choice.fps == self.sampling.fps:
            return replace(self.sampled, max_pixels=choice.max_pixels)
        count = max(1, math.ceil(self.sampled.seconds * choice.fps - 1e-9))
        fps, frames = replace(self.sampling, fps=choice.fps).spread(count, self.sampled.seconds)
        return replace(self.sampled, frames=frames, fps=fps, max_pixels=choice.max_pixels)

    def tokens(self, choice: Choice) -> int:
        """Tokens of the whole prompt. Raises `OptionError` for a size that the model does not take."""
        if choice.fps not in self._texts:
            sampled = self.at(choice)
            grid = self.template.grid(self.config, sampled)
            self._texts[choice.fps] = sum(map(len, grid.between)) + self.around(sampled, grid)
        return self._frames(choice).tokens + self._texts[choice.fps]

    def size(self, choice: Choice) -> tuple[int, int]:
        """Height and width of a frame as the vision tower sees it, without its tiles."""
        grid = self._frames(choice)
        return self.template.family.tower_size(self.config, self.template.processor, grid.rows, grid.columns)

    def pixels(self, choice: Choice) -> int:
        """Pixels of a frame as the vision tower sees it, with its tiles."""
        grid = self._frames(choice)
        return math.prod(self.size(choice)) * grid.step_tokens // (grid.rows * grid.columns)

    def _frames(self, choice: Choice) -> VideoGrid:
        """The video's tokens without the text between its steps."""
        sampled = self.at(choice)
        if choice.max_pixels is None:  # the size may depend on the number of frames
            return self.template.frames(self.config, sampled)
        if choice.max_pixels not in self._grids:
            self._grids[choice.max_pixels] = self.template.frames(self.config, sampled)
        grid = self._grids[choice.max_pixels]
        return replace(grid, steps=-(-sampled.frames // grid.frames_per_step))

    @cached_property
    def resizable(self) -> bool:
        """Whether the size of the frames can be chosen."""
        try:
            self._frames(replace(self.asked, max_pixels=self.pixels(replace(self.asked, max_pixels=None))))
        except OptionError:
            return False
        return True

    # ---- searches

    def smaller(self, choice: Choice, least: int, most_tokens: int) -> Choice | None:
        """The largest frames, of a limit from `least` to their size, with which the prompt has at most `most_tokens`;
        None if it has more even with the smallest."""
        lowest = self.smallest(choice, least)
        if lowest.max_pixels is None or lowest == choice or self.tokens(lowest) > most_tokens:
            return None
        least, top = lowest.max_pixels, self.pixels(choice)

        def at(pixels: int) -> Choice:
            return replace(choice, max_pixels=pixels)

        found = at(least + largest(lambda more: self.tokens(at(least + more)) <= most_tokens, top - least))
        plain = at(max(least, self.pixels(found)))  # a number that states the size, where it gives the same one
        return plain if self.size(plain) == self.size(found) and self.tokens(plain) == self.tokens(found) else found

    def smallest(self, choice: Choice, least: int) -> Choice:
        """With the lowest limit from `least` on that the model takes; the choice itself if frames are no larger."""
        if not self.resizable or (top := self.pixels(choice)) <= least:
            return choice

        try:
            self._frames(replace(choice, max_pixels=least))
        except TooFewPixels as error:
            least = error.least
        return choice if least >= top else replace(choice, max_pixels=least)

    def slower(self, choice: Choice, least: float, most_tokens: int) -> Choice | None:
        """The highest rate, from `least` on and in two digits, at which the prompt has at most `most_tokens`; None if
        it has more even at the lowest."""
        rates = _rates(least, self.at(choice).fps)

        def fits(count: int) -> bool:
            return self.tokens(replace(choice, fps=rates[count - 1])) <= most_tokens

        found = largest(fits, len(rates))
        return replace(choice, fps=rates[found - 1]) if found else None


def _rates(least: float, below: float) -> list[float]:
    """All rates in two digits from `least` to less than `below`, in order."""
    exponents = range(math.floor(math.log10(least)), math.floor(math.log10(below)) + 1)
    rates = [float(f"{digits}e{exponent - 1}") for exponent in exponents for digits in range(10, 100)]
    return [rate for rate in rates if least <= rate < below]


def fitted(film: Film, most_tokens: int, rate: bool = True, size: bool = True) -> Choice | None:
    """The first choice by `RULE` with which the prompt has at most `most_tokens`; None if none has.

    rate, size: whether it may be lowered. What was asked for stays if it has no more.
    """
    choice = film.asked
    if film.tokens(choice) <= most_tokens:
        return choice
    for what, least in RULE:
        if what == "rate" and rate and film.at(choice).fps > least:
            if found := film.slower(choice, least, most_tokens):
                return found
            choice = replace(choice, fps=least)
        elif what == "size" and size:
            if found := film.smaller(choice, int(least), most_tokens):
                return found
            choice = film.smallest(choice, int(least))
    return None


def cost(film: Film, choice: Choice) -> int:
    """How far down `RULE` a choice is: the lower, the less answers lose."""
    asked = film.asked
    lowered = {}
    if (rate := film.at(choice).fps) < film.at(asked).fps:
        lowered["rate"] = rate
    if choice.max_pixels is not None and choice.max_pixels < film.pixels(asked):
        lowered["size"] = choice.max_pixels

    def stage(what: str, value: float) -> int:
        stages = (index for index, (name, least) in enumerate(RULE, 1) if name == what and value >= least)
        return next(stages, len(RULE) + 1)

    return max((stage(what, value) for what, value in lowered.items()), default=0)
