"""What a saved session must agree with: the model behind its keys and values, the processor behind its tokens.

Weights are compared as a fingerprint; settings are kept readable, so that a difference can be named.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from tieredkv import adapters
from tieredkv.errors import UnsupportedModelError
from tieredkv.weights import entries, plain_tensors

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

_COLUMNS = 4096  # of 8-byte words
_MOVING_ROPE = {"dynamic", "longrope"}
"""Kinds of positions whose frequencies depend on what was computed last."""
_SHORT = 1024
"""Numbers of a buffer that is kept as it is."""
_RTOL = 1e-4
"""Frequencies computed on two devices differ by less, those rounded to bfloat16 by more."""


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
    of any one weight, and a swap of any two, is always noticed. Quantised weights are summed as they are stored. The
    weights of adapters that are not in use are left out, unless `all_adapters`, which is how files were written at
    first. Weights without memory (torch's meta device) are an `UnsupportedModelError`.
    """
    found: Iterable[tuple[str, torch.Tensor]] = entries(model)
    if not all_adapters:
        idle = adapters.weights(model, used=False)
        held = ((name, tensor) for name, tensor in found if not f"{name}.".startswith(idle))
        found = sorted(((adapters.plain_name(name), tensor) for name, tensor in held), key=lambda entry: entry[0])
    return {"config": _hash(model_settings(model)), "weights": _weights_hash(found)}


def adapter_weights(model: Any) -> str:
    """A hash of the weights of adapters in use alone: they are few, so it can be made for every question."""
    used = adapters.weights(model, used=True)
    return _weights_hash(entry for entry in entries(model) if f"{entry[0]}.".startswith(used)) if used else ""


def model_state(model: Any) -> dict[str, Any]:
    """What decides keys and values but is neither in the weights nor in `model_settings`, as JSON holds it.

    "adapters": those in use, and their scales, by layer. "buffers": tensors that a checkpoint does not hold, such as
    the frequencies of positions; floats as they are, up to what two devices compute otherwise, and the rest as a hash.
    "quantization": how the model was quantised, where it says so.
    """
    quantization: Any = getattr(model.config, "quantization_config", None)
    if hasattr(quantization, "to_dict"):
        quantization = quantization.to_dict()
    made: dict[str, Any] = json.loads(
        _canonical({"adapters": adapters.in_use(model), "buffers": _buffers(model), "quantization": quantization})
    )
    return made


def state_difference(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """How two `model_state`s differ, in words; None where they do not. Adapters are compared by `adapters.difference`.

    What only one of them has is no difference, as in `settings_difference`.
    """
    for name in sorted(saved["buffers"].keys() & now["buffers"].keys()):
        if not _alike(saved["buffers"][name], now["buffers"][name]):
            return f"the model's buffer {name} differs"
    old, new = ({"quantization_config": state["quantization"] or {}} for state in (saved, now))
    return settings_difference(old, new)


def _buffers(model: Any) -> dict[str, Any]:
    """Values of short buffers of floats, hashes of the others; without those that a forward pass changes."""
    stored = model.state_dict().keys()
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        kinds = getattr(module, "rope_type", None) or ""
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        moving = any(kind in _MOVING_ROPE for kind in kinds)
        for own, tensor in module.named_buffers(recurse=False):
            name = f"{path}.{own}" if path else own
            if name in stored or (moving and "original" not in own):
                continue
            short = tensor.is_floating_point() and tensor.numel() <= _SHORT and tensor.device.type != "meta"
            found[adapters.plain_name(name)] = (
                [float(f"{value:.9g}") for value in tensor.double().flatten().tolist()]
                if short
                else _weights_hash([(own, tensor)])
            )
    return found


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return bool(a == b)
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=_RTOL, abs_tol=1e-30) for x, y in zip(a, b, strict=True))


def _weights_hash(found: Iterable[tuple[str, torch.Tensor]]) -> str:
    made = hashlib.sha256()
    for name, tensor in found:
        for about, part in plain_tensors(tensor, name):
            if part.device.type == "meta":
                raise UnsupportedModelError(f"weight {name} is not in memory (device meta): load the whole model.")
            made.update(f"{about}\n".encode())
            for sums in _sums(part):
                made.update(sums)
    return made.hexdigest()


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


def _sums(tensor: torch.Tensor) -> Iterator[bytes]:
    """Bytes that stand for all bits of a tensor, computed on its device without a copy of it.

    The tensor is read as a table of 8-byte words, summed as integers modulo 2**64 down columns and along rows; what
    fills no row is given as it is. One changed word changes its row's sum and its column's. Of two changed words, as
    after a swap, either both columns' sums change or, in one column, both rows'. Integer sums do not depend on the
    order of adding, so every device and thread count gives the same.
    """
    octets = tensor.detach().reshape(-1).view(torch.uint8)  # copies where the weight is not contiguous
    if octets.storage_offset() % 8:
        octets = octets.clone()  # words cannot start there
    whole = octets.numel() - octets.numel() % (8 * _COLUMNS)
    if whole:
        table = octets[:whole].view(torch.int64).view(-1, _COLUMNS)
        yield torch.cat([table.sum(0), table.sum(1)]).cpu().numpy().tobytes()
    yield octets[whole:].cpu().numpy().tobytes()
