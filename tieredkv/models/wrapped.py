"""Finds the transformers model inside other libraries' wrappers, and checks that it is ready for inference."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd

from tieredkv.errors import UnsupportedModelError
from tieredkv.models import adapters
from tieredkv.models.weights import modules

_OUTSIDE = ("ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA")
"""PEFT methods that need the wrapper's forward, which is not run here. Prompt learning needs it too."""


def unwrapped(model: Any) -> Any:
    """The model inside a `PeftModel`, a compiled model or `DataParallel`; any other object unchanged.

    LoRA and similar adapters work in the layers, so the model inside answers as the wrapper does. Raises
    `UnsupportedModelError` for adapters that work in the wrapper.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(model: Any) -> Any:
    if isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        return model.module
    if not isinstance(model, torch.nn.Module):
        return None
    if "_orig_mod" in model._modules:  # torch.compile's wrapper, whose class is slow to import
        return model._modules["_orig_mod"]
    if (peft := sys.modules.get("peft")) is None:  # not imported, so there is no such wrapper
        return None
    if isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        _check_adapters(model)
        return model.base_model
    return model.model if isinstance(model, peft.tuners.tuners_utils.BaseTuner) else None


def _check_adapters(model: Any) -> None:
    for name in model.active_adapters:
        config = model.peft_config[name]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "alora_invocation_tokens", None):
            kind = "aLoRA"
        elif not config.is_prompt_learning and kind not in _OUTSIDE:
            continue
        raise UnsupportedModelError(
            f"the adapter {name!r} is of type {kind}, which changes the prompt or the model's forward, not its layers: "
            "that is not supported; give a LoRA or another adapter of layers, or the model without it."
        )


def check_mode(model: Any) -> None:
    """Raise `UnsupportedModelError` for a model in training mode where that changes results.

    Also for adapters that draw random numbers in every mode.
    """
    for name, module in modules(model):
        samples = vars(module).get("sample_at_inference")  # PEFT's PVeRA, by adapter
        if isinstance(samples, dict) and any(samples.get(adapter) for adapter in adapters.active_in(module)):
            raise UnsupportedModelError(
                f"an adapter samples at inference, so answers would be random ({name}): set sample_at_inference=False."
            )
        if not module.training:
            continue
        dropout = _drops(module) or (samples and adapters.active_in(module))
        if dropout or getattr(module, "gradient_checkpointing", False):
            what = "random dropout" if dropout else "gradient checkpointing, which drops the cache"
            raise UnsupportedModelError(
                f"the model is in training mode, with {what} ({name or 'the model itself'}): call model.eval() first."
            )


def _drops(module: Any) -> bool:
    """Whether a module in training mode uses dropout, itself or through functions that it calls."""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    rates = (value for own, value in vars(module).items() if "drop" in own and own[0] != "_")
    each = (rate for value in rates for rate in (value.values() if isinstance(value, dict) else [value]))
    return any(isinstance(rate, float | int) and not isinstance(rate, bool) and rate > 0 for rate in each)
