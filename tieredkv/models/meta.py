"""A model on torch's meta device: names and shapes of its weights, without their memory."""

from __future__ import annotations

import copy
from typing import Any

import torch

from tieredkv.errors import UnsupportedModelError, first_line
from tieredkv.models import families


def on_meta(config: Any, dtype: torch.dtype) -> Any:
    """The model of a config, not quantised. Raises `UnsupportedModelError` if it cannot be built."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    video = config.model_type in families.VIDEO_FAMILIES
    kind: Any = AutoModelForImageTextToText if video else AutoModelForCausalLM
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    try:
        with torch.device("meta"):
            return kind.from_config(config, dtype=dtype)
    except (ImportError, AttributeError, LookupError, TypeError, ValueError) as error:
        # A package that the vision tower needs is missing, or the config is damaged where only the model reads it.
        raise UnsupportedModelError(f"the model cannot be built ({first_line(error)}).") from None
