"""Question: what a cache is told about the tokens that follow what it holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tieredkv.cache.looks import Looks
from tieredkv.errors import check_whole


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """The end of a prompt, and the answer to it. Raises `OptionError` unless counts are whole numbers of at least 0.

    Three uses:

    - `Question()`, under `model.generate`: where the prompt ends is unknown, so every call is scored.
    - `CONTEXT`: nothing is scored, as what is being asked is still to come.
    - `Question(prompt_tokens=...)`: the call that completes the prompt is scored, no other.
    """

    max_new_tokens: int = 256
    """Generated tokens for which device room is set aside; one more raises."""
    prompt_tokens: int = 0
    """Length of the prompt up to the end of the question; 0: not known."""
    rows: int | None = None
    """Last rows of a scored call that are scored, at most; None: as many as the policy's `text_window`."""
    visual: torch.Tensor | None = None
    """`(n,)` mask of visual tokens, over the first n of the prompt; those after them are text. None: all but the last
    `rows` tokens count as visual."""
    looks: Looks | None = None
    """Records what the scored rows and the steps attend to; None: nothing is recorded."""
    trace: bool = False
    """Record in the counters which chunks every step attends to."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "prompt_tokens", "rows"):
            if (name, value := getattr(self, name)) != ("rows", None):
                check_whole(name, value, least=0)

    def most_rows(self, text_window: int) -> int:
        """Rows of a scored call that are scored, at most."""
        return text_window if self.rows is None else self.rows

    def scored_rows(self, past: int, new: int, text_window: int) -> int:
        """Rows to score of a call of `new` tokens after `past` others: 0 if the prompt goes on after it."""
        return 0 if past + new < self.prompt_tokens else min(new, self.most_rows(text_window))


CONTEXT = Question(rows=0)
"""For the part of a prompt that questions will be asked of. Without scored rows nothing seals the cache."""
