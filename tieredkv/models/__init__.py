"""What the runtime must know of a model family: one small file each, found from the model's config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tieredkv.errors import UnsupportedModelError
from tieredkv.models.base import VideoFamily
from tieredkv.models.qwen2_5_vl import Qwen25VL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VIDEO_FAMILIES: dict[str, VideoFamily] = {"qwen2_5_vl": Qwen25VL()}
TEXT_FAMILIES = ("llama", "qwen2")


def video_family(config: PreTrainedConfig) -> VideoFamily:
    """The adapter for a model that takes video. Raises `UnsupportedModelError`, naming what is supported."""
    family = VIDEO_FAMILIES.get(config.model_type)
    if family is None:
        text = (
            f" {config.model_type} takes no video: use model.generate(past_key_values=TieredCache(...))."
            if config.model_type in TEXT_FAMILIES
            else ""
        )
        raise UnsupportedModelError(
            f"models of type {config.model_type!r} are not supported for video: {', '.join(VIDEO_FAMILIES)} "
            f"{'is' if len(VIDEO_FAMILIES) == 1 else 'are'}.{text}"
        )
    return family


def check_text_family(model_type: str) -> None:
    """Raise `UnsupportedModelError` unless a `TieredCache` has been tested under this decoder."""
    known = (*TEXT_FAMILIES, *(family.text_model_type for family in VIDEO_FAMILIES.values()))
    if model_type not in known:
        raise UnsupportedModelError(
            f"TieredCache does not support decoders of type {model_type!r}: {', '.join(known)} are supported."
        )
