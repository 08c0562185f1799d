"""Whether a text can be asked, before anything is loaded."""

from __future__ import annotations

from typing import Any

from tieredkv.errors import PromptError


def check_prompt(prompt: Any) -> None:
    """Raise `PromptError` unless `prompt` is text, not blank, that can be written as UTF-8 without nulls."""
    if not isinstance(prompt, str):
        raise PromptError(f"the prompt is of type {type(prompt).__name__}: give the question as text.")
    if not prompt.strip():
        raise PromptError("the prompt is empty: ask something.")
    if "\0" in prompt:
        raise PromptError("the prompt contains a null character, as text in UTF-16 does: give it in UTF-8.")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt contains half a character ({prompt[error.start]!a} at position {error.start + 1}): give whole "
            "characters, in UTF-8."
        ) from None
