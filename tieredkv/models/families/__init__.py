"""Model families, one file each, found by the model's config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tieredkv.environment.versions import cache_name
from tieredkv.errors import UnsupportedModelError
from tieredkv.models.families.base import VideoFamily
from tieredkv.models.families.gemma4 import Gemma4
from tieredkv.models.families.internvl import InternVL
from tieredkv.models.families.llava_onevision import LlavaOnevision
from tieredkv.models.families.qwen2_5_vl import Qwen25VL
from tieredkv.models.families.qwen2_vl import Qwen2VL
from tieredkv.models.families.qwen3_5 import Qwen35
from tieredkv.models.families.qwen3_vl import Qwen3VL
from tieredkv.models.families.smolvlm import SmolVLM

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VIDEO_FAMILIES: dict[str, VideoFamily] = {
    "qwen2_vl": Qwen2VL(),
    "qwen2_5_vl": Qwen25VL(),
    "qwen3_vl": Qwen3VL(),
    "qwen3_5": Qwen35(),
    "qwen3_5_moe": Qwen35(),
    "llava_onevision": LlavaOnevision(),
    "internvl": InternVL(),
    "smolvlm": SmolVLM(),
    "gemma4": Gemma4(),
}
TEXT_FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "gemma4_text", "qwen3_5_text")
"""Decoders for text, by the `model_type` of their config, with which `TieredCache` is tested."""
OTHER_LAYERS = {
    "gemma3_text": ("sliding_attention",),
    "gemma4_text": ("sliding_attention",),
    "qwen3_5_text": ("linear_attention",),
    "qwen3_5_moe_text": ("linear_attention",),
}
"""Types of layers besides full attention that a decoder is tested with, by its `model_type`."""
VIDEO_DECODERS = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_5_moe_text")
"""Decoders that are tested within video families only."""
REQUIREMENTS = (
    "A new family needs an adapter like those in tieredkv/models/families, and decoder layers that attend through "
    "transformers' AttentionInterface to plain keys and values."
)


def video_family(config: PreTrainedConfig) -> VideoFamily:
    """The adapter of a video model. Raises `UnsupportedModelError`, which names the supported families."""
    family = VIDEO_FAMILIES.get(config.model_type)
    if family is None:
        if config.model_type in TEXT_FAMILIES:
            more = f"{config.model_type} takes no video: use model.generate({cache_name()}=TieredCache(...))."
        else:
            more = REQUIREMENTS
        raise UnsupportedModelError(
            f"models of type {config.model_type!r} are not supported for video: {', '.join(VIDEO_FAMILIES)} are. {more}"
        )
    return family


def check_layers(text: PreTrainedConfig) -> list[str]:
    """The type of each layer of a decoder's config. Raises `UnsupportedModelError` for unsupported types."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    check_text_family(text.model_type, getattr(text, "layer_types", None) or ())
    kinds, _ = get_layer_types_and_kwargs(text)
    if shared := getattr(text, "num_kv_shared_layers", 0):
        kinds = kinds[: text.num_hidden_layers - shared]
    supported = ("full_attention", *OTHER_LAYERS.get(text.model_type, ()))
    if other := sorted(set(kinds) - set(supported)):
        raise UnsupportedModelError(
            f"{text.model_type} has layers of type {', '.join(other)}; TieredCache supports only "
            f"{', '.join(supported)} in such a model."
        )
    if "full_attention" not in kinds or getattr(text, "use_bidirectional_attention", False) in (True, "all"):
        raise UnsupportedModelError(f"this {text.model_type} has no cache that grows: it needs no tiers.")
    return list(kinds)


def readers(text: PreTrainedConfig) -> int:
    """How many layers attend to the keys and values of the last layer of full attention that has its own."""
    own = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", 0) or 0)
    return sum(kind == "full_attention" for kind in (getattr(text, "layer_types", None) or ())[own:])


def check_text_family(model_type: str, layer_types: Sequence[str] = ()) -> None:
    """Raise `UnsupportedModelError` unless `TieredCache` is tested with this decoder.

    layer_types: those of its layers, which the error names if some are not full attention.
    """
    supported = (*TEXT_FAMILIES, *VIDEO_DECODERS)
    if model_type not in supported:
        types = sorted(set(layer_types))
        layers = f" with layers of type {', '.join(types)}" if set(types) - {"full_attention"} else ""
        raise UnsupportedModelError(
            f"TieredCache does not support decoders of type {model_type!r}{layers}: {', '.join(supported)} are "
            f"supported. {REQUIREMENTS}"
        )
