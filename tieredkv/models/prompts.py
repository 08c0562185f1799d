"""Whether a text can be asked, before anything is loaded."""

from __future__ import annotations

from typing import Any

from tieredkv.errors import PromptError


def check_prompt(prompt: Any) -> None:
    """Raise `PromptError` unless `prompt` is text, not blank, that can be written as UTF-8 without nulls."""
    check_text("prompt", prompt, "the question", "ask something")


def check_system(system: Any) -> None:
    """Raise `PromptError` for a system prompt that is no text; None is no system prompt."""
    if system is not None:
        check_text("system prompt", system)


def check_text(what: str, text: Any, given: str = "it", remedy: str = "leave it out") -> None:
    """Raise `PromptError` unless `text` is text, not blank, that can be written as UTF-8 without nulls.

    what: its name in the message. given: what is to be given as text. remedy: what to do if it is blank.
    """
    if not isinstance(text, str):
        raise PromptError(f"the {what} is of type {type(text).__name__}: give {given} as text.")
    if not text.strip():
        raise PromptError(f"the {what} is empty: {remedy}.")
    if "\0" in text:
        raise PromptError(f"the {what} contains a null character, as text in UTF-16 does: give it in UTF-8.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the {what} contains half a character ({text[error.start]!a} at position {error.start + 1}): give whole "
            "characters, in UTF-8."
        ) from None
