"""What differs between the releases of transformers that are supported, settled in one place."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any


@cache
def cache_name() -> str:
    """Name by which a model's `forward` and `generate` take a cache: `past_key_values` in releases before 5.24."""
    from transformers import GenerationMixin  # takes seconds

    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in known else "past_key_values"


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument that gives a model its cache: `model(input_ids, **cache_argument(cache))`."""
    return {cache_name(): cache}
