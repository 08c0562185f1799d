"""Settings of models and processors that keys, values and tokens depend on.

Sessions save them in readable form, so that a difference from the model or processor in use can be named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from tieredkv.models import families

_TOP = (
    "model_type",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
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
    "out_hidden_size",
    "num_position_embeddings",
    "rope_parameters",
)
_VOLATILE = {"processor_class", "auto_map", "return_metadata", "return_tensors", "device", "name_or_path"}


def model_settings(model: Any) -> dict[str, Any]:
    """The fields of a transformers model's configuration that its keys and values depend on.

    A list of fields to include, not to exclude: a session must survive changes of the many fields without effect
    (dropout, labels, `use_cache`, the attention function, paths, versions) and of those that releases add. A
    family and a decoder state their own; most show in the shapes of the weights, which `model_fingerprint` hashes.
    Fields that are absent or None are left out, so that a field added later with a default of None changes nothing. The
    dtype is that of the loaded weights, not the one in the file.
    """
    config = model.config.to_dict()
    text = config.get("text_config") or config
    family = families.VIDEO_FAMILIES.get(config["model_type"])
    decoder = families.find_decoder(text.get("model_type"))
    top, vision = (family.settings, family.vision_settings) if family else ((), ())
    return {
        **_selected(config, _TOP + top),
        "dtype": str(model.dtype).removeprefix("torch."),
        "text": _selected(text, _TEXT + (decoder.settings if decoder else ())),
        "vision": _selected(config.get("vision_config") or {}, _VISION + vision),
    }


def processor_settings(processor: Any) -> dict[str, Any]:
    """The settings of a processor that change pixels or tokens, as plain JSON values.

    The video processor's settings without paths, versions, devices and result types; hashes of the chat template
    and the vocabulary. The image processor is left out, as videos do not pass through it.
    """
    video, tokenizer = processor.video_processor, processor.tokenizer
    settings = {
        key: value
        for key, value in video.to_dict().items()
        if key not in _VOLATILE and not key.startswith("_") and not key.endswith(("_version", "_path"))
    }
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    plain: dict[str, Any] = json.loads(
        canonical(
            {
                "processor": type(processor).__name__,
                "video_processor": {**settings, "class": type(video).__name__},
                "tokenizer": {"class": type(tokenizer).__name__, "vocabulary": value_hash(tokenizer.get_vocab())},
                "chat_template": value_hash(template),
            }
        )
    )
    return plain


def settings_difference(saved: dict[str, Any], now: dict[str, Any], most: int = 3) -> str | None:
    """The first `most` settings that differ, with both values, in words; None if none differ.

    For `model_settings` and `processor_settings`. A setting that only one side has does not count: releases of
    transformers add settings, with defaults that leave results unchanged.
    """
    differences = list(_differences(saved, json.loads(canonical(now)), ""))
    more = f" and {len(differences) - most} more" if len(differences) > most else ""
    return ", ".join(differences[:most]) + more if differences else None


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
    fields = {name: config[name] for name in names if config.get(name) is not None}
    if "rope_parameters" in fields:
        fields["rope_parameters"] = {k: v for k, v in fields["rope_parameters"].items() if v is not None}
    plain: dict[str, Any] = json.loads(canonical(fields))
    return plain


def canonical(value: Any) -> str:
    """The same JSON text for equal values; types that JSON lacks (dtypes, paths) as text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def value_hash(value: Any) -> str:
    """SHA-256 of `canonical`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()
