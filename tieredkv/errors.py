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
