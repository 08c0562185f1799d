"""Differences between the supported releases of transformers."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

OLDEST, NEWEST = "5.17", "5.24"
"""The releases of transformers between which tieredkv is tested."""


@cache
def cache_name() -> str:
    """The argument of a model's `forward` and `generate` that takes a cache: `past_key_values` before 5.24."""
    from transformers import GenerationMixin  # takes seconds

    arguments = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in arguments else "past_key_values"


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument that passes a cache to a model: `model(input_ids, **cache_argument(cache))`."""
    return {cache_name(): cache}
