"""Which values generation settings may have: transformers' ranges, checked before any work and without importing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tieredkv.errors import OptionError, check_value, is_number

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value is valid, and what to give instead."""


def _number(want: str, valid: Callable[[float], bool]) -> Rule:
    return lambda value: is_number(value) and valid(value), want


def _whole(least: int) -> Rule:
    return lambda value: _is_whole(value) and value >= least, f"a whole number of at least {least}"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_tokens(value: Any) -> bool:
    """False for what cannot be token ids; arrays and tensors of any kind may be."""
    values = value if isinstance(value, list | tuple) else [value]
    return not any(isinstance(one, str | bytes | float | bool | dict) for one in values)


def _are_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(one, str) for one in value))


_SHARE = _number("a number from 0 to 1", lambda value: 0 <= value <= 1)
_SHARE_ABOVE_0 = _number("a number above 0 and at most 1", lambda value: 0 < value <= 1)
_CUTOFF = _number("a number of at least 0 and below 1", lambda value: 0 <= value < 1)
_FACTOR = _number("a number above 0", lambda value: value > 0)
_SWITCH: Rule = (lambda value: isinstance(value, bool), "True or False")
_TOKENS: Rule = (lambda value: not isinstance(value, int) and _are_tokens(value), "a list of token ids")
_TOKEN: Rule = (_are_tokens, "a token id, or a list of them")

RULES: dict[str, Rule] = {
    "max_new_tokens": _whole(1),
    "min_new_tokens": _whole(0),
    "min_length": _whole(0),
    "max_time": _number("seconds, 0 or more", lambda value: value >= 0),
    "stop_strings": (_are_texts, "a text, or a list of texts"),
    "do_sample": _SWITCH,
    "seed": (lambda value: _is_whole(value) and -(2**63) <= value < 2**63, "a whole number of 64 bits"),
    "temperature": _number("a number of at least 0", lambda value: value >= 0),
    "top_k": _whole(0),
    "top_p": _SHARE,
    "min_p": _SHARE,
    "top_h": _SHARE_ABOVE_0,
    "typical_p": _SHARE_ABOVE_0,
    "epsilon_cutoff": _CUTOFF,
    "eta_cutoff": _CUTOFF,
    "repetition_penalty": _FACTOR,
    "encoder_repetition_penalty": _FACTOR,
    "no_repeat_ngram_size": _whole(0),
    "encoder_no_repeat_ngram_size": _whole(0),
    "renormalize_logits": _SWITCH,
    "remove_invalid_values": _SWITCH,
    "forced_bos_token_id": _TOKEN,
    "forced_eos_token_id": _TOKEN,
    "eos_token_id": _TOKEN,
    "suppress_tokens": _TOKENS,
    "begin_suppress_tokens": _TOKENS,
}
"""Settings whose valid values can be told from the value alone. None always leaves the choice to the model."""

FRACTIONS = frozenset(("temperature", "repetition_penalty", "encoder_repetition_penalty"))
"""Settings for which transformers wants a float, and refuses a whole number such as 2."""


def check_values(options: Mapping[str, Any]) -> None:
    """Raise `OptionError` for a setting with a value that it cannot have; unknown names are left alone."""
    for name in RULES.keys() & options.keys():
        value = options[name]
        valid, want = RULES[name]
        check_value(value is None or valid(value), name, value, want)
    if options.get("do_sample") and options.get("temperature") == 0:
        raise OptionError("temperature=0 with do_sample=True is not valid: give a number above 0, or no do_sample.")


def as_fractions(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with whole numbers as floats where transformers wants these."""
    return {name: float(value) if name in FRACTIONS and _is_whole(value) else value for name, value in settings.items()}
