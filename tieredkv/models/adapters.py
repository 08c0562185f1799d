"""PEFT adapters of a model: which are in use, with which scales, settings and weights.

Reads the layers that PEFT puts into a model, which are the same for its own wrapper and for transformers'
`load_adapter`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from tieredkv.models.weights import modules

Layers = dict[str, dict[str, float | None]]
"""By layer, the adapters and their scales; None for an adapter without a scale."""

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
"""Fields of an adapter's configuration that change no result, or that show in the layers."""


def in_use(model: Any) -> Layers:
    """Adapters in use, neither disabled nor merged into the weights of their layers."""
    return {path: active for path, layer in _layers(model) if (active := active_in(layer))}


def merged(model: Any) -> dict[str, list[str]]:
    """By layer, the adapters that are merged into its weights."""
    enabled = ((path, layer) for path, layer in _layers(model) if not layer.disable_adapters)
    return {path: sorted(layer.merged_adapters) for path, layer in enabled if getattr(layer, "merged_adapters", None)}


def weights(model: Any, used: bool) -> tuple[str, ...]:
    """Name prefixes, each ending in a dot, of the weights of adapters in use; with used=False, of all others.

    Merged adapters are among the others: the weights of their layers include theirs.
    """
    return tuple(
        f"{path}.{attribute}.{name}."
        for path, layer in _layers(model)
        for active in [active_in(layer)]
        for attribute, parts in _by_adapter(layer, (*layer.adapter_layer_names, *_others(layer)))
        if hasattr(parts, "state_dict")
        for name in parts.keys()  # noqa: SIM118  containers of modules
        if (name in active) == used
    )


def settings(model: Any, names: list[str]) -> dict[str, Any]:
    """Configurations of these adapters as plain JSON values, without the fields in `_IDLE` and the like."""
    configs = getattr(model, "peft_config", {})
    return {
        name: {
            key: _plain(value)
            for key, value in config.items()
            if key not in _IDLE and not key.startswith("init_") and "drop" not in key and value is not None
        }
        for name, config in ((name, configs[name].to_dict()) for name in names if name in configs)
    }


def values(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and values that layers keep per adapter in use besides weights: scales, seeds, indices, fixed tensors."""
    for path, layer in _layers(model):
        for name in active_in(layer):
            for attribute, parts in _by_adapter(layer, _others(layer)):
                if name in parts:
                    yield f"{path}.{attribute}.{name}", parts[name]


def plain_name(name: str) -> str:
    """The name of a weight in the model without adapters."""
    return f".{name}".replace(".base_layer.", ".").replace(".original_module.", ".")[1:]


def names(layers: Layers) -> list[str]:
    """All adapters in use in any layer."""
    return sorted({name for active in layers.values() for name in active})


def difference(before: Layers, now: Layers) -> str | None:
    """How the adapters in use have changed, as the end of a sentence; None if they have not."""
    if before == now:
        return None
    old, new = names(before), names(now)
    if old != new:
        return f"under {in_words(old)}, now {in_words(new)} is active"
    for name in old:
        a, b = (sorted({str(active[name]) for active in layers.values() if name in active}) for layers in (before, now))
        if a != b:
            return f"with the adapter {name} scaled by {' and '.join(a)}, now it is scaled by {' and '.join(b)}"
    return f"under {in_words(old)}, now active in other layers"


def in_words(adapters: list[str]) -> str:
    """A phrase that names the adapters."""
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


def _by_adapter(layer: Any, attributes: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """A layer's attributes that are containers with an entry for each adapter."""
    for attribute in attributes:
        parts = attrgetter(attribute)(layer)
        if hasattr(parts, "keys"):
            yield attribute, parts


def _plain(value: Any) -> Any:
    """The value with text as keys and with sorted sets: their order differs between processes."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else value


def active_in(layer: Any) -> dict[str, float | None]:
    """A layer's adapters in use, and their scales."""
    if layer.disable_adapters or getattr(layer, "merged_adapters", None):
        return {}
    present = {name for _, parts in _by_adapter(layer, layer.adapter_layer_names) for name in parts.keys()}  # noqa: SIM118
    scaling: Any = getattr(layer, "scaling", None)
    scales: dict[str, Any] = dict(scaling) if hasattr(scaling, "keys") else {}
    return {
        name: None if scales.get(name) is None else float(scales[name])
        for name in layer.active_adapters
        if name in present
    }
