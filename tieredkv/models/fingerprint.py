"""Fingerprints of a model's weights and settings, and the rest of the state that its keys and values depend on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch

from tieredkv.models import adapters
from tieredkv.models.module_values import buffers, nearly_equal, numbers
from tieredkv.models.settings import canonical, model_settings, settings_difference, value_hash
from tieredkv.models.weights import entries, tensors_hash

_ADDED = ("layer_norm_eps", "hidden_activation")
"""Fields that the hash of settings leaves out, because hashes in older files do not cover them."""


def model_fingerprint(model: Any, all_adapters: bool = False) -> dict[str, str]:
    """`{"config": hex, "weights": hex}`, equal for models that compute the same keys and values.

    "config" covers `model_settings`. "weights" covers every bit of `model.state_dict()`, its names, shapes and dtypes,
    but not the device: exact sums are computed where the weights are, and only these are copied to the host. A change
    of one weight and a swap of two are always noticed. Quantised weights are summed as they are stored. Weights of
    adapters that are not in use are left out, unless `all_adapters`, as in the first session files. Raises
    `UnsupportedModelError` for weights without memory (torch's meta device).
    """
    tensors: Iterable[tuple[str, torch.Tensor]] = entries(model)
    if not all_adapters:
        idle = adapters.weights(model, used=False)
        kept = ((name, tensor) for name, tensor in tensors if not f"{name}.".startswith(idle))
        tensors = sorted(((adapters.plain_name(name), tensor) for name, tensor in kept), key=lambda entry: entry[0])
    settings = {
        group: {name: field for name, field in value.items() if name not in _ADDED}
        if isinstance(value, dict)
        else value
        for group, value in model_settings(model).items()
    }
    return {"config": value_hash(settings), "weights": tensors_hash(tensors)}


def adapter_weights(model: Any) -> str:
    """A hash of only the weights of adapters in use, small enough to be computed for every question.

    Leaves out weights that accelerate has moved out of memory.
    """
    if not (used := adapters.weights(model, used=True)):
        return ""
    tensors = ((name, tensor) for name, tensor in entries(model) if f"{name}.".startswith(used))
    return tensors_hash((name, tensor) for name, tensor in tensors if tensor.device.type != "meta")


def model_state(model: Any, long: bool = True) -> dict[str, Any]:
    """What keys and values depend on besides the weights and `model_settings`, as plain JSON values.

    "adapters": those in use and their scales, by layer. "adapter_settings": by name. "buffers": tensors that are not in
    checkpoints, such as the frequencies of positions; short ones of floats as they are, others as a hash, or left out
    if `long` is False. "numbers": plain numbers of modules. "quantization": the configuration's, if any.
    """
    quantization: Any = getattr(model.config, "quantization_config", None)
    if hasattr(quantization, "to_dict"):
        quantization = quantization.to_dict()
    used = adapters.in_use(model)
    state = {
        "adapters": used,
        "adapter_settings": adapters.settings(model, adapters.names(used)),
        "buffers": buffers(model, long),
        "numbers": numbers(model),
        "quantization": quantization,
    }
    plain: dict[str, Any] = json.loads(canonical(state))
    return plain


def state_difference(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """How two `model_state`s differ, in words; None if they do not. `adapters.difference` compares the adapters.

    An entry that only one side has does not count, as in `settings_difference`.
    """
    for name in sorted(saved["buffers"].keys() & now["buffers"].keys()):
        if not nearly_equal(saved["buffers"][name], now["buffers"][name]):
            return f"the model's buffer {name} differs"
    old, new = (
        {
            "adapter": state.get("adapter_settings", {}),
            **state.get("numbers", {}),
            "quantization_config": state["quantization"] or {},
        }
        for state in (saved, now)
    )
    return settings_difference(old, new)


def fingerprint_difference(saved: dict[str, str], now: dict[str, str]) -> str | None:
    """Which parts of two `model_fingerprint`s differ, in words; None if none do."""
    config, weights = (saved.get(part) != now.get(part) for part in ("config", "weights"))
    if config and weights:
        return "the model's configuration and weights differ"
    if config:
        return "the model's configuration differs"
    return "the model's weights differ" if weights else None
