"""Values that modules compute with but checkpoints do not contain: buffers and plain numbers."""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

import torch

from tieredkv.models import adapters
from tieredkv.models.weights import modules, tensors_hash

_MOVING_ROPE = {"dynamic", "longrope"}
"""Types of rotary positions whose frequencies depend on the last forward pass."""
_SHORT = 1024
"""Largest buffer, in elements, of which the values are kept instead of a hash."""
_RTOL = 1e-4
"""Frequencies computed on different devices differ by less than this, those rounded to bfloat16 by more."""
_KNOWN = ("torch.", "transformers.", "peft.")
"""Libraries whose modules are covered. Quantisation libraries' numbers change with the device and the first forward."""
_IDLE = {"training", "gradient_checkpointing", "layer_idx", "padding_idx", "sparse", "scale_grad_by_freq"}
"""Numbers without effect at inference."""
_PASSIVE = {torch.nn.ModuleDict, torch.nn.ModuleList, torch.nn.ParameterDict, torch.nn.Dropout, torch.nn.Identity}
_LAYER = re.compile(r"(?<![^.])\d+(?=\.)")


def buffers(model: Any, long: bool = True) -> dict[str, Any]:
    """Values of short float buffers, hashes of the others, by name.

    Leaves out buffers that a forward pass changes, those of adapters not in use, and, if `long` is False, those that
    would be hashed. With `long`, raises `UnsupportedModelError` for a buffer that is not in memory.
    """
    result: dict[str, Any] = {}
    idle = adapters.weights(model, used=False)
    for path, module in modules(model):
        for own in module._non_persistent_buffers_set:  # the others are in the checkpoint
            tensor, name = module._buffers.get(own), f"{path}.{own}" if path else own
            if tensor is None or (_moving(module) and "original" not in own) or f"{name}.".startswith(idle):
                continue
            short = tensor.is_floating_point() and tensor.numel() <= _SHORT and tensor.device.type != "meta"
            if short:
                values = [_rounded(value) for value in tensor.double().flatten().tolist()]
            if short or long:
                result[adapters.plain_name(name)] = values if short else tensors_hash([(own, tensor)])
    return result


def nearly_equal(a: Any, b: Any) -> bool:
    """Whether two values of a buffer are equal up to differences between devices."""
    if isinstance(a, str) or isinstance(b, str):
        return bool(a == b)
    return len(a) == len(b) and all(x == y or math.isclose(x, y, rel_tol=_RTOL) for x, y in zip(a, b, strict=True))


def numbers(model: Any) -> dict[str, Any]:
    """Plain numbers of modules, and values that PEFT's layers keep for adapters in use.

    By name, with * for the number of a layer: the value that all layers share, or the list of their values.
    """
    result: dict[str, Any] = {}
    idle = adapters.weights(model, used=False)
    for path, module in modules(model):
        kind = type(module)
        if kind in _PASSIVE or not kind.__module__.startswith(_KNOWN) or _moving(module):
            continue
        if f"{path}.".startswith(idle):
            continue
        prefix = f"{path}." if path else ""
        for own, value in vars(module).items():
            if isinstance(value, float | int) and own[0] != "_" and own not in _IDLE and "drop" not in own:
                result[adapters.plain_name(prefix + own)] = _rounded(value)
    hashes: dict[int, str] = {}  # several layers share a tensor
    for name, value in adapters.values(model):
        if "drop" not in name and (plain := _plain(value, hashes)) is not None:
            result[name] = plain
    return _merge_layers(result)


def _merge_layers(values: dict[str, Any]) -> dict[str, Any]:
    merged: dict[str, list[Any]] = {}
    for name, value in values.items():
        merged.setdefault(_LAYER.sub("*", name), []).append(value)
    return {name: each[0] if each.count(each[0]) == len(each) else each for name, each in merged.items()}


def _plain(value: Any, hashes: dict[int, str]) -> Any:
    """A plain JSON value; None for modules, functions and the like. hashes: of tensors, by id."""
    if isinstance(value, torch.Tensor):
        if value.device.type == "meta":
            return None
        if id(value) not in hashes:
            hashes[id(value)] = tensors_hash([("", value)])[:16]
        return hashes[id(value)]
    if isinstance(value, list | tuple) and all(isinstance(part, int | float | str) for part in value):
        return hashlib.sha256(repr(list(value)).encode()).hexdigest()[:16]
    if isinstance(value, float | int):
        return _rounded(value)
    return value if isinstance(value, str) else None


def _rounded(value: float | int) -> Any:
    """The number without its last digits, in which machines may differ; as text if JSON has no such number."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else str(value)


def _moving(module: Any) -> bool:
    kinds = vars(module).get("rope_type") or ""
    return any(kind in _MOVING_ROPE for kind in (kinds.values() if isinstance(kinds, dict) else [kinds]))
