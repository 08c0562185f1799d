"""What modules hold beside the weights of a checkpoint and compute with: short buffers, plain numbers."""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

import torch

from tieredkv.models import adapters
from tieredkv.models.weights import modules, tensors_hash

_MOVING_ROPE = {"dynamic", "longrope"}
"""Kinds of positions whose frequencies depend on what was computed last."""
_SHORT = 1024
"""Numbers of a buffer that is kept as it is."""
_RTOL = 1e-4
"""Frequencies computed on two devices differ by less, those rounded to bfloat16 by more."""
_KNOWN = ("torch.", "transformers.", "peft.")
"""Whose modules' numbers count. Those of quantisation libraries change with the device and the first forward pass."""
_IDLE = {"training", "gradient_checkpointing", "layer_idx", "padding_idx", "sparse", "scale_grad_by_freq"}
"""Numbers that decide nothing where a model answers."""
_PASSIVE = {torch.nn.ModuleDict, torch.nn.ModuleList, torch.nn.ParameterDict, torch.nn.Dropout, torch.nn.Identity}
_LAYER = re.compile(r"(?<![^.])\d+(?=\.)")


def buffers(model: Any, long: bool = True) -> dict[str, Any]:
    """Values of short buffers of floats, hashes of the others; without those that a forward pass changes, and
    those of adapters that are not in use.

    long: with the others, and `UnsupportedModelError` for what is not in memory.
    """
    found: dict[str, Any] = {}
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
                found[adapters.plain_name(name)] = values if short else tensors_hash([(own, tensor)])
    return found


def alike(a: Any, b: Any) -> bool:
    """Whether the values of a buffer are the same, but for what two devices compute otherwise."""
    if isinstance(a, str) or isinstance(b, str):
        return bool(a == b)
    return len(a) == len(b) and all(x == y or math.isclose(x, y, rel_tol=_RTOL) for x, y in zip(a, b, strict=True))


def numbers(model: Any) -> dict[str, Any]:
    """Plain numbers of modules, and what layers of PEFT keep for the adapters in use; without those of idle adapters.

    By place, with * for the number of a layer: the value that all layers have, or the list of their values.
    """
    found: dict[str, Any] = {}
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
                found[adapters.plain_name(prefix + own)] = _rounded(value)
    hashes: dict[int, str] = {}  # several layers share a tensor
    for place, value in adapters.values(model):
        if "drop" not in place and (told := _told(value, hashes)) is not None:
            found[place] = told
    return _by_place(found)


def _by_place(found: dict[str, Any]) -> dict[str, Any]:
    places: dict[str, list[Any]] = {}
    for name, value in found.items():
        places.setdefault(_LAYER.sub("*", name), []).append(value)
    return {place: all_of[0] if all_of.count(all_of[0]) == len(all_of) else all_of for place, all_of in places.items()}


def _told(value: Any, hashes: dict[int, str]) -> Any:
    """A value as JSON holds it; None for what is no value, such as a module or a function."""
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
    """Without the last digits, in which two machines may differ; as text where JSON has no such number."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else str(value)


def _moving(module: Any) -> bool:
    kinds = vars(module).get("rope_type") or ""
    return any(kind in _MOVING_ROPE for kind in (kinds.values() if isinstance(kinds, dict) else [kinds]))
