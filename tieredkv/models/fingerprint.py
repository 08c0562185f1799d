"""What a saved session must agree with: the model behind its keys and values, the processor behind its tokens.

Weights are compared as a fingerprint; settings are kept readable, so that a difference can be named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from tieredkv.models import adapters
from tieredkv.models.module_values import alike, buffers, numbers
from tieredkv.models.weights import entries, tensors_hash

_TOP = (
    "model_type",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "downsample_ratio",
    "scale_factor",
    "projector_hidden_act",
)
_TEXT = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "rope_parameters",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "use_bidirectional_attention",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "attention_bias",
    "mlp_bias",
)
_VISION = (
    "model_type",
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "embed_dim",
    "mlp_ratio",
    "num_heads",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "in_channels",
    "num_channels",
    "image_size",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "tokens_per_second",
    "window_size",
    "fullatt_block_indexes",
    "out_hidden_size",
    "num_position_embeddings",
    "deepstack_visual_indexes",
    "rope_parameters",
)
_VOLATILE = {"processor_class", "auto_map", "return_metadata", "return_tensors", "device", "name_or_path"}

_ADDED = ("layer_norm_eps", "hidden_activation")
"""Fields that the hash of settings leaves out: older files' hashes do not cover them."""


def model_settings(model: Any) -> dict[str, Any]:
    """What of a transformers model's configuration decides its keys and values, for `settings_difference`.

    A selected list of fields, not all but some: configurations are full of what changes nothing (dropout, labels,
    `use_cache`, the attention function), where the checkpoint lay and which transformers wrote it, and each release
    adds keys. A session must survive all of these. The price, that a new family's own fields must be added here, is
    bounded: most fields show in the shapes of the weights, which `model_fingerprint` hashes anyway. Fields that are
    absent or None are left out, so a key added later with None for "as before" changes nothing. The dtype is the
    loaded weights', not the one in the file.
    """
    config = model.config.to_dict()
    text = config.get("text_config") or config
    return {
        **_selected(config, _TOP),
        "dtype": str(model.dtype).removeprefix("torch."),
        "text": _selected(text, _TEXT),
        "vision": _selected(config.get("vision_config") or {}, _VISION),
    }


def model_fingerprint(model: Any, all_adapters: bool = False) -> dict[str, str]:
    """`{"config": hex, "weights": hex}`: equal for models that compute the same keys and values.

    "config" covers `model_settings`. "weights" covers every bit of `model.state_dict()`, its names, shapes and dtypes,
    but not the device: weights are summed where they are, exactly, and only the sums are brought to the host. A change
    of any one weight, and a swap of any two, is always noticed. Quantised weights are summed as they are stored. What
    layers hold for adapters that are not in use is left out, unless `all_adapters`, which is how files were written at
    first. Weights without memory (torch's meta device) are an `UnsupportedModelError`.
    """
    found: Iterable[tuple[str, torch.Tensor]] = entries(model)
    if not all_adapters:
        idle = adapters.weights(model, used=False)
        held = ((name, tensor) for name, tensor in found if not f"{name}.".startswith(idle))
        found = sorted(((adapters.plain_name(name), tensor) for name, tensor in held), key=lambda entry: entry[0])
    settings = {
        key: {field: of for field, of in value.items() if field not in _ADDED} if isinstance(value, dict) else value
        for key, value in model_settings(model).items()
    }
    return {"config": _hash(settings), "weights": tensors_hash(found)}


def adapter_weights(model: Any) -> str:
    """A hash of the weights of adapters in use alone: they are few, so it can be made for every question.

    Without those that accelerate has moved out of memory.
    """
    if not (used := adapters.weights(model, used=True)):
        return ""
    found = ((name, tensor) for name, tensor in entries(model) if f"{name}.".startswith(used))
    return tensors_hash((name, tensor) for name, tensor in found if tensor.device.type != "meta")


def model_state(model: Any, long: bool = True) -> dict[str, Any]:
    """What decides keys and values but is neither in the weights nor in `model_settings`, as JSON holds it.

    "adapters": those in use, and their scales, by layer. "adapter_settings": theirs, by name. "buffers": tensors that
    a checkpoint does not hold, such as the frequencies of positions; floats as they are, up to what two devices
    compute otherwise, and the rest as a hash, unless `long` is False. "numbers": what modules hold as plain numbers.
    "quantization": how the model was quantised, where it says so.
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
    made: dict[str, Any] = json.loads(_canonical(state))
    return made


def state_difference(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """How two `model_state`s differ, in words; None where they do not. Adapters are compared by `adapters.difference`.

    What only one of them has is no difference, as in `settings_difference`.
    """
    for name in sorted(saved["buffers"].keys() & now["buffers"].keys()):
        if not alike(saved["buffers"][name], now["buffers"][name]):
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


def explain(saved: dict[str, str], now: dict[str, str]) -> str | None:
    """Which parts of two `model_fingerprint`s differ, in words; None where none does."""
    config, weights = (saved.get(part) != now.get(part) for part in ("config", "weights"))
    if config and weights:
        return "the model's configuration and weights differ"
    if config:
        return "the model's configuration differs"
    return "the model's weights differ" if weights else None


def processor_settings(processor: Any) -> dict[str, Any]:
    """What of a processor changes pixels or tokens, as JSON holds it, for `settings_difference`.

    All of the video processor's settings but paths, versions, devices and kinds of result; the chat template and the
    vocabulary as hashes. The image processor is left out: videos do not pass through it.
    """
    video, tokenizer = processor.video_processor, processor.tokenizer
    settings = {
        key: value
        for key, value in video.to_dict().items()
        if key not in _VOLATILE and not key.startswith("_") and not key.endswith(("_version", "_path"))
    }
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    plain: dict[str, Any] = json.loads(
        _canonical(
            {
                "processor": type(processor).__name__,
                "video_processor": {**settings, "class": type(video).__name__},
                "tokenizer": {"class": type(tokenizer).__name__, "vocabulary": _hash(tokenizer.get_vocab())},
                "chat_template": _hash(template),
            }
        )
    )
    return plain


def settings_difference(saved: dict[str, Any], now: dict[str, Any], most: int = 3) -> str | None:
    """Names the first `most` settings that differ, with both values; None where none does.

    For `model_settings` and `processor_settings`. A setting that only one of them has is no difference: releases of
    transformers add settings, with a default that leaves results as they were.
    """
    found = list(_differences(saved, json.loads(_canonical(now)), ""))
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more if found else None


def _differences(saved: dict[str, Any], now: dict[str, Any], prefix: str) -> Iterator[str]:
    for key in sorted(saved.keys() & now.keys()):
        a, b = saved[key], now[key]
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key} was {_short(a)}, is {_short(b)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:12]}...{text[-5:]}"


def _selected(config: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    found = {name: config[name] for name in names if config.get(name) is not None}
    if "rope_parameters" in found:
        found["rope_parameters"] = {k: v for k, v in found["rope_parameters"].items() if v is not None}
    plain: dict[str, Any] = json.loads(_canonical(found))
    return plain


def _canonical(value: Any) -> str:
    """JSON that equal values share; what JSON lacks (dtypes, paths) by its name."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _hash(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()
