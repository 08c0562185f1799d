"""Answers of the demo, and how many of their words are right."""

from __future__ import annotations

from dataclasses import dataclass

from tieredkv.session.results import Generation
from tieredkv.tiny.scene import SceneQuestion


@dataclass(frozen=True, slots=True)
class ComparedAnswer:
    """One question, answered with tiered memory and with a full cache."""

    question: SceneQuestion
    tiered: Generation
    full: str


def right_words(question: SceneQuestion, answer: str) -> int:
    """Number of words that equal the true word at the same position."""
    return sum(a == b for a, b in zip(question.words, answer.split(), strict=False))


def right_hops(question: SceneQuestion, answer: str) -> int:
    """Number of hops of a chain whose two words, a letter and a shape, are both right."""
    words = answer.split()[: len(question.words)]
    right = [a == b for a, b in zip(question.words, words, strict=False)]
    right += [False] * (len(question.words) - len(right))
    return sum(a and b for a, b in zip(right[::2], right[1::2], strict=True))
