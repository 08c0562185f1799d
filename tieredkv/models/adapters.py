"""Which of a model's PEFT adapters are in use, how, and where their weights are: those are in the model, in use or not.

Both of PEFT's ways into a model are covered, its own wrapper and transformers' `load_adapter`: they put the same layers
into it, and these are asked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from tieredkv.models.weights import modules

Layers = dict[str, dict[str, float | None]]
"""By layer, adapters and their scales; None for an adapter without one."""

_IDLE = {
    "peft_version",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "bias",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
}
"""Of an adapter's configuration: where it came from, and what the layers that it is in show."""


def in_use(model: Any) -> Layers:
    """Adapters that are computed beside their layers' own weights, neither disabled nor merged into these."""
    return {path: active for path, layer in _layers(model) if (active := active_in(layer))}


def merged(model: Any) -> dict[str, list[str]]:
    """By layer, adapters whose weights are added to its own."""
    found = ((path, layer) for path, layer in _layers(model) if not layer.disable_adapters)
    return {path: sorted(layer.merged_adapters) for path, layer in found if getattr(layer, "merged_adapters", None)}


def weights(model: Any, used: bool) -> tuple[str, ...]:
    """Prefixes, each ending in a dot, of the names of weights that belong to adapters in use (or, with `used=False`, to
    the others).

    Merged adapters are among the others: their weights are in those of their layers.
    """
    return tuple(
        f"{path}.{attribute}.{name}."
        for path, layer in _layers(model)
        for active in [active_in(layer)]
        for attribute, held in _held(layer, (*layer.adapter_layer_names, *_others(layer)))
        if hasattr(held, "state_dict")
        for name in held.keys()  # noqa: SIM118  containers of modules
        if (name in active) == used
    )


def settings(model: Any, names: list[str]) -> dict[str, Any]:
    """What these adapters' configurations say, as JSON holds it, but for what decides no result or shows elsewhere."""
    configs = getattr(model, "peft_config", {})
    found = {name: configs[name].to_dict() for name in names if name in configs}
    return {
        name: {
            key: _plain(value)
            for key, value in config.items()
            if key not in _IDLE and not key.startswith("init_") and "drop" not in key and value is not None
        }
        for name, config in found.items()
    }


def values(model: Any) -> Iterator[tuple[str, Any]]:
    """What layers keep for each adapter in use beside its weights, and where: scales, seeds, indices, fixed tensors."""
    for path, layer in _layers(model):
        for name in active_in(layer):
            for attribute, held in _held(layer, _others(layer)):
                if name in held:
                    yield f"{path}.{attribute}.{name}", held[name]


def plain_name(name: str) -> str:
    """The name that a weight has in a model without adapters."""
    return f".{name}".replace(".base_layer.", ".").replace(".original_module.", ".")[1:]


def names(layers: Layers) -> list[str]:
    """All adapters that are in use anywhere."""
    return sorted({name for active in layers.values() for name in active})


def difference(before: Layers, now: Layers) -> str | None:
    """How adapters in use have changed, as the end of a sentence; None where they have not."""
    if before == now:
        return None
    old, new = names(before), names(now)
    if old != new:
        return f"under {told(old)}, now {told(new)} is active"
    for name in old:
        a, b = (sorted({str(active[name]) for active in layers.values() if name in active}) for layers in (before, now))
        if a != b:
            return f"with the adapter {name} scaled by {' and '.join(a)}, now it is scaled by {' and '.join(b)}"
    return f"under {told(old)}, now in use in other layers"


def told(adapters: list[str]) -> str:
    """Adapters in a sentence."""
    return f"the adapter {' with '.join(adapters)}" if adapters else "no adapter"


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    if "peft" not in sys.modules:
        return
    for path, module in modules(model):
        kind = type(module)
        if hasattr(kind, "adapter_layer_names") and hasattr(kind, "disable_adapters"):
            yield path, module


def _others(layer: Any) -> tuple[str, ...]:
    return tuple(name for name in getattr(layer, "other_param_names", ()) if hasattr(layer, name))


def _held(layer: Any, attributes: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Those of a layer's attributes that are containers by adapter, and what they are."""
    for attribute in attributes:
        held = attrgetter(attribute)(layer)
        if hasattr(held, "keys"):
            yield attribute, held


def _plain(value: Any) -> Any:
    """With text for keys, and sets, whose order is another in each process, sorted."""
    if isinstance(value, dict):
        return {str(key): _plain(of) for key, of in value.items()}
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else value


def active_in(layer: Any) -> dict[str, float | None]:
    """The adapters that a layer computes beside its own weights, and their scales."""
    if layer.disable_adapters or getattr(layer, "merged_adapters", None):
        return {}
    has = {name for _, held in _held(layer, layer.adapter_layer_names) for name in held.keys()}  # noqa: SIM118  containers of modules
    scaling: Any = getattr(layer, "scaling", None)
    scales: dict[str, Any] = dict(scaling) if hasattr(scaling, "keys") else {}
    return {
        name: None if scales.get(name) is None else float(scales[name]) for name in layer.active_adapters if name in has
    }
