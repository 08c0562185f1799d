"""What differs between the releases of transformers that are supported, settled in one place."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import Cache, GenerationMixin

CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
"""Name by which a model's `forward` and `generate` take a cache: `past_key_values` in releases before 5.24."""


def cache_argument(cache: Cache) -> dict[str, Any]:
    """The keyword argument that gives a model its cache: `model(input_ids, **cache_argument(cache))`."""
    return {CACHE_ARGUMENT: cache}
