"""What would make a video fit that does not, in words: the rate, the frame size and the budgets, computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tieredkv.config import TierConfig
from tieredkv.errors import BudgetError
from tieredkv.memory.units import GIB, as_gib, largest
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning.admission import Request, check_memory, smallest_cap_bytes
from tieredkv.planning.disk_plan import to_disk
from tieredkv.planning.fitting import RULE, Choice, Film, cost, fitted
from tieredkv.planning.host_plan import prompt_bits, smaller_settings
from tieredkv.planning.prefill_plan import question_rows
from tieredkv.planning.sizes import Layout, host_bytes
from tieredkv.video.sampling import LEAST_PIXELS, RATES, Sampling

ROOMY = 2
"""`fit=True` lowers a film until the cap is this many times the smallest, which leaves a step little to attend to."""


@dataclass(frozen=True)
class Advice:
    """For one video and a question about it."""

    film: Film
    shape: KVShape
    tiers: TierConfig
    question_tokens: int
    new_tokens: int
    available: int
    """Bytes of host memory."""
    one_memory: bool = False
    """Whether the device tier is in host memory."""
    card_bytes: int | None = None
    """What the card has for keys and values; None: unknown."""
    folder: Path | None = None
    """On disk, for what `host_kv_gb` does not hold; None: nothing goes there."""
    trained: int | None = None
    """Longest context that the model is made for; None: unknown."""

    def check(self, request: Request) -> Layout:
        """Raise `BudgetError` unless a prompt with this video can be served, and return its layout."""
        return self._check(request, self.tiers, (self.cap, self.host, self.shared))

    def _check(self, request: Request, tiers: TierConfig, remedies: tuple[Any, Any, Any] = ("", "", "")) -> Layout:
        device, host, shared = remedies
        return check_memory(
            self.shape,
            tiers,
            request,
            device,
            host,
            shared,
            available=self.available,
            one_memory=self.one_memory,
            folder=self.folder,
        )

    def fits(self, tokens: int, tiers: TierConfig) -> bool:
        """Whether a prompt of `tokens` tokens can be served."""
        try:
            self._check(Request(tokens, self.question_tokens, self.new_tokens), tiers)
        except BudgetError:
            return False
        return True

    def most_tokens(self, tiers: TierConfig) -> int:
        """Of the prompts with no more tokens than the video has as asked for, the longest that can be served."""
        return largest(lambda tokens: self.fits(tokens, tiers), self._tokens)

    @cached_property
    def _tokens(self) -> int:
        return self.film.tokens(self.film.asked)

    # ---- fit=True

    def fit(self, sampling: Sampling) -> tuple[Sampling, str]:
        """The rate and the size chosen, as far as `sampling` leaves them open, and a line that states them.

        A video that fits is left as it is. Another is lowered, if it can be, until the prompt is no longer than the
        model is made for, and the cap roomy. Raises `BudgetError` if nothing fits.
        """
        film, rate, size = self.film, sampling.fps is None, sampling.max_pixels is None
        most = self.most_tokens(self.tiers)
        roomy = self.most_tokens(replace(self.tiers, gpu_kv_gb=self.tiers.gpu_kv_gb / ROOMY))
        if self.trained is not None:
            roomy = min(roomy, self.trained - self.new_tokens)
        choice = film.asked if self._tokens <= most else fitted(film, roomy, rate, size)
        choice = choice or fitted(film, most, rate, size)
        if choice is None:
            raise self._nothing_fits(most, rate, size)
        line = f"fit: {self._described(choice)}"
        if choice == film.asked:
            return replace(sampling, fit=False), f"{line}, as asked for."
        line += f" ({self.words(choice)}), instead of {self._described(film.asked)}"
        line += "".join(f", which fits with {option}" for option in self._fewer_bits(self._tokens)) + "."
        fps = sampling.fps if choice.fps == film.asked.fps else choice.fps
        return replace(sampling, fps=fps, max_pixels=choice.max_pixels, fit=False), line

    def _described(self, choice: Choice) -> str:
        film, rate = self.film, f"{self.film.at(choice).fps:.3g}"
        height, width = film.size(choice)
        frames = "frame" if rate == "1" else "frames"
        return f"{rate} {frames} per second at {width}x{height}, {film.tokens(choice):,} tokens"

    def _nothing_fits(self, most: int, rate: bool, size: bool) -> BudgetError:
        lowest = self.film.asked
        for what, least in RULE:
            if what == "rate" and rate:
                lowest = replace(lowest, fps=min(least, lowest.fps))
            elif what == "size" and size:
                lowest = self.film.smallest(lowest, int(least))
        tokens = self.film.tokens(lowest)
        least_cap = smallest_cap_bytes(
            self.shape,
            self.tiers,
            Request(tokens, self.question_tokens, self.new_tokens).layout(self.tiers),
            question_rows(self.tiers, self.question_tokens),
        )
        ways = ["that", *self._fewer_bits(tokens), "a shorter part of the video (start, end)"]
        return BudgetError(
            f"fit=True goes down to {self._described(lowest)}, and {most:,} fit: those need gpu_kv_gb="
            f"{as_gib(least_cap)} and {as_gib(self._host_bytes(tokens))} GiB of host memory. Give "
            f"{', '.join(ways[:-1])}, or {ways[-1]}."
        )

    def _host_bytes(self, tokens: int) -> int:
        return host_bytes(self.shape, self.tiers, tokens, prompt_bits(self.shape, self.tiers, tokens))

    def _fewer_bits(self, tokens: int) -> list[str]:
        """The option with which a prompt of `tokens` tokens can be served as it is, or none."""
        for smaller in smaller_settings(self.shape, self.tiers, tokens):
            if self.fits(tokens, smaller):
                return [f"host_kv_bits={smaller.host_kv_bits}"]
        return []

    # ---- refusals

    def cap(self, smallest: int) -> str:
        """After a refusal that names the smallest cap, of `smallest` bytes."""
        enough = replace(self.tiers, gpu_kv_gb=float(as_gib(smallest)))
        changes = self._changes()
        if self.card_bytes is not None and smallest > self.card_bytes:
            changes = changes or ["a shorter part of the video (start, end)"]
            return f"The card has {self.card_bytes / GIB:.3g} GiB for it: give {_either(changes)}."
        if not self.fits(self._tokens, enough):  # the host has no room either
            return f"Give {_either(changes)}." if changes else "Host memory is too small as well."
        return f"Raise it, or give {_either(changes)}." if changes else "Raise it."

    def host(self, allowed: int) -> str:
        """After a refusal of the host tier, which may have `allowed` bytes."""
        changes = self._changes()
        if (needed := self._host_bytes(self._tokens)) <= self.available:
            changes.append(f"host_kv_gb={as_gib(needed)}")
        if self.folder is not None:
            bits = prompt_bits(self.shape, self.tiers, self._tokens)
            changes += to_disk(self.shape, self.tiers, self._tokens, bits, allowed, self.folder)
        return f"give {_either(changes)}" if changes else "that is too little for any video"

    def shared(self, allowed: int) -> str:
        """The same where one memory of `allowed` bytes must hold both tiers."""
        changes = self._changes()
        return f"give {_either(changes)}, or lower gpu_kv_gb" if changes else "lower gpu_kv_gb"

    def _changes(self) -> list[str]:
        """Options with which the video fits, those first that cost answers least."""
        film, most = self.film, self.most_tokens(self.tiers)
        found = [
            fitted(film, most),
            film.slower(film.asked, RATES[0], most),
            film.smaller(film.asked, LEAST_PIXELS, most),
        ]
        choices = [choice for choice in dict.fromkeys(found) if choice is not None and choice != film.asked]
        lowered = [self.words(choice, sized=True) for choice in sorted(choices, key=lambda choice: cost(film, choice))]
        return lowered + self._fewer_bits(self._tokens)

    def words(self, choice: Choice, sized: bool = False) -> str:
        """The options that state a choice, as far as it differs from what was asked for. sized: with the frame size."""
        asked, parts = self.film.asked, []
        if choice.fps != asked.fps:
            parts.append(f"fps={choice.fps:g}")
        if choice.max_pixels != asked.max_pixels:
            height, width = self.film.size(choice)
            parts.append(f"max_pixels={choice.max_pixels}" + (f" ({width}x{height})" if sized else ""))
        return " with ".join(parts)


def _either(changes: list[str]) -> str:
    return " or ".join([", ".join(changes[:-1]), changes[-1]] if len(changes) > 1 else changes)
