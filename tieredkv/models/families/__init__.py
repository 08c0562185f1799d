"""What the runtime must know of a model family: one small file each, found from the model's config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tieredkv.environment.versions import cache_name
from tieredkv.errors import UnsupportedModelError
from tieredkv.models.families.base import VideoFamily
from tieredkv.models.families.internvl import InternVL
from tieredkv.models.families.llava_onevision import LlavaOnevision
from tieredkv.models.families.qwen2_5_vl import Qwen25VL
from tieredkv.models.families.qwen2_vl import Qwen2VL
from tieredkv.models.families.qwen3_vl import Qwen3VL
from tieredkv.models.families.smolvlm import SmolVLM

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VIDEO_FAMILIES: dict[str, VideoFamily] = {
    "qwen2_vl": Qwen2VL(),
    "qwen2_5_vl": Qwen25VL(),
    "qwen3_vl": Qwen3VL(),
    "llava_onevision": LlavaOnevision(),
    "internvl": InternVL(),
    "smolvlm": SmolVLM(),
}
TEXT_FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")
"""Decoders, by the `model_type` of their own config, that a `TieredCache` is tested under without a video."""
SLIDING_FAMILIES = ("gemma3_text",)
"""Of these, those some of whose layers see only the last tokens."""
VIDEO_DECODERS = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
"""Decoders that only video families have."""
WHAT_IT_TAKES = (
    "a new family takes an adapter like those in tieredkv/models, and decoder layers that attend through transformers' "
    "AttentionInterface to plain keys and values"
)


def video_family(config: PreTrainedConfig) -> VideoFamily:
    """The adapter for a model that takes video. Raises `UnsupportedModelError`, naming what is supported."""
    family = VIDEO_FAMILIES.get(config.model_type)
    if family is None:
        if config.model_type in TEXT_FAMILIES:
            more = f"{config.model_type} takes no video: use model.generate({cache_name()}=TieredCache(...))."
        else:
            more = f"{WHAT_IT_TAKES[0].upper()}{WHAT_IT_TAKES[1:]}."
        raise UnsupportedModelError(
            f"models of type {config.model_type!r} are not supported for video: {', '.join(VIDEO_FAMILIES)} are. {more}"
        )
    return family


def check_layers(text: PreTrainedConfig) -> list[str]:
    """The kind of each layer of a decoder's config; raises `UnsupportedModelError` for kinds that are not served."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    check_text_family(text.model_type)
    kinds, _ = get_layer_types_and_kwargs(text)
    served = {"full_attention", *(("sliding_attention",) if text.model_type in SLIDING_FAMILIES else ())}
    if other := sorted(set(kinds) - served):
        raise UnsupportedModelError(
            f"{text.model_type} has layers of type {', '.join(other)}; TieredCache serves full attention only."
        )
    if "full_attention" not in kinds or getattr(text, "use_bidirectional_attention", False):
        raise UnsupportedModelError(f"this {text.model_type} attends to no cache that grows: it needs no tiers.")
    return list(kinds)


def check_text_family(model_type: str) -> None:
    """Raise `UnsupportedModelError` unless a `TieredCache` has been tested under this decoder."""
    known = (*TEXT_FAMILIES, *VIDEO_DECODERS)
    if model_type not in known:
        raise UnsupportedModelError(
            f"TieredCache does not support decoders of type {model_type!r}: {', '.join(known)} are supported. "
            f"{WHAT_IT_TAKES[0].upper()}{WHAT_IT_TAKES[1:]}."
        )
