"""Question: what a cache needs to know about the tokens that follow the cached ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tieredkv.cache.looks import Looks
from tieredkv.errors import check_whole
from tieredkv.planning.prefill_plan import Call


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """The end of a prompt, and the answer to it. Raises `OptionError` unless counts are whole numbers of at least 0.

    Three uses:

    - `Question()`, under `model.generate`: where the prompt ends is unknown, so every call is scored.
    - `CONTEXT`: no call is scored, as questions are still to come.
    - `Question(prompt_tokens=...)`: the call that completes the prompt is scored; none before it.
    """

    max_new_tokens: int = 256
    """Generated tokens for which device room is set aside; one more raises."""
    prompt_tokens: int = 0
    """Length of the prompt up to the end of the question; 0: not known."""
    rows: int | None = None
    """At most this many of the last rows of a scored call are scored; None: the policy's `text_window`."""
    visual: torch.Tensor | None = None
    """`(n,)` mask of visual tokens, over the first n of the prompt; those after them are text. None: all but the last
    `rows` tokens count as visual."""
    looks: Looks | None = None
    """Records what the scored rows and the steps attend to; None: nothing is recorded."""
    trace: bool = False
    """Record in the counters which chunks every step attends to."""

    def __post_init__(self) -> None:
        check_whole("max_new_tokens", self.max_new_tokens, 0)
        check_whole("prompt_tokens", self.prompt_tokens, 0)
        if self.rows is not None:
            check_whole("rows", self.rows, 0)

    def most_rows(self, text_window: int) -> int:
        """`rows`, or the policy's."""
        return text_window if self.rows is None else self.rows

    def call(self, past: int, new: int, text_window: int) -> Call:
        """The call of `new` tokens after `past` others; no row of it is scored if the prompt goes on after it."""
        stop = past + new
        return Call(past, stop, 0 if stop < self.prompt_tokens else min(new, self.most_rows(text_window)))


CONTEXT = Question(rows=0)
"""For the part of a prompt that questions will be asked about. Without scored rows nothing seals the cache."""
