"""Errors that users can fix: each message says what is wrong and what to do. Also checks of plain values.

The command line prints that sentence to stderr and exits with code 2.
"""

from __future__ import annotations

import sys
from typing import TypeGuard


class TieredKVError(Exception):
    """Base of every error that a change of the input or the settings can fix."""


class BudgetError(TieredKVError, ValueError):
    """A memory size is invalid, or too small for the request; the message names the smallest that works."""


class VideoError(TieredKVError, ValueError):
    """A video, or frames given as arrays, cannot be read or have the wrong shape, dtype or rate."""


class UnsupportedModelError(TieredKVError, ValueError):
    """The model's family is not supported; the message lists those that are."""


class OptionError(TieredKVError, TypeError):
    """An option is unknown, has a value out of its range, or is not supported here."""


class PromptError(TieredKVError, ValueError):
    """The prompt is empty, or contains a token that only the runtime may write."""


class SessionError(TieredKVError, ValueError):
    """A saved session cannot be read, is damaged, or belongs to another model, processor or video."""


class OutputError(TieredKVError, OSError):
    """A file cannot be written; the message says which, and why."""


class BatchError(TieredKVError, ValueError):
    """A file of questions or answers is invalid; the message gives the line and the reason."""


def check_value(ok: bool, name: str, value: object, want: str, error: type[TieredKVError] = OptionError) -> None:
    """Raise `error`, naming the value and what is allowed, unless `ok`."""
    if not ok:
        raise error(f"{name}={value!r} is not valid: give {want}.")


def check_whole(name: str, value: object, least: int = 1, error: type[TieredKVError] = OptionError) -> None:
    """Raise `error` unless `value` is a whole number of at least `least`; a bool is not."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    check_value(whole, name, value, f"a whole number of at least {least}", error)


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is an int or float that a float can hold, and finite; a bool is neither."""
    most = sys.float_info.max  # compared, since larger whole numbers cannot be converted
    return isinstance(value, int | float) and not isinstance(value, bool) and -most <= value <= most


FAILURES = (TieredKVError, RuntimeError, MemoryError, ValueError, TypeError, OSError)
"""Errors that end one question or video while the others go on; torch's own are RuntimeErrors."""


def reason(error: BaseException) -> str:
    """The error in one line: the message of a `TieredKVError`, the file and what is wrong of an `OSError`, or its type
    and message."""
    if isinstance(error, OSError) and not isinstance(error, TieredKVError):
        return f"{error.filename or 'input or output'}: {error.strerror or error}."
    first = next(iter(str(error).strip().splitlines()), "")
    return first if isinstance(error, TieredKVError) else f"{type(error).__name__}: {first}"


def first_line(error: BaseException) -> str:
    """First line of another library's error, for use inside a sentence; the error's type if it has no text."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".:") if text else type(error).__name__
