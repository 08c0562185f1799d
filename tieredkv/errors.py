"""Errors that are the user's to mend: one sentence that says what was wrong and what to do.

The command line turns each of these into that sentence on stderr and exit code 2.
"""


class TieredKVError(Exception):
    """Base of every error that a change of the input or the settings can mend."""


class BudgetError(TieredKVError, ValueError):
    """A memory budget is malformed, or too small for what was asked; says the smallest that works."""


class VideoError(TieredKVError, ValueError):
    """A video, or frames given as arrays, cannot be read or have the wrong shape, dtype or rate."""


class UnsupportedModelError(TieredKVError, ValueError):
    """The model's family is not supported; says which are."""


class OptionError(TieredKVError, TypeError):
    """A generation option is unknown or not supported here."""


class PromptError(TieredKVError, ValueError):
    """The prompt is empty, or holds a token that only the runtime may write."""


class SessionError(TieredKVError, ValueError):
    """A saved session cannot be read, is damaged, or belongs to another model, processor or video; says which."""


class OutputError(TieredKVError, OSError):
    """A file cannot be written; says which, and why."""


class BatchError(TieredKVError, ValueError):
    """A file of questions or of answers cannot be used as it is; says which line, and what is wrong with it."""


FAILURES = (TieredKVError, RuntimeError, MemoryError, ValueError, TypeError, OSError)
"""What one question or video may fail with while others go on; torch's own errors are RuntimeErrors."""


def reason(error: BaseException) -> str:
    """What went wrong, in a line; an error that is not ours begins with its kind."""
    first = next(iter(str(error).strip().splitlines()), "")
    return first if isinstance(error, TieredKVError) else f"{type(error).__name__}: {first}"


def first_line(error: BaseException) -> str:
    """The first line of another library's error, to stand inside a sentence; without text, the error's kind."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".:") if text else type(error).__name__
