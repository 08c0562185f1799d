"""Model families, one file each, found by the model's config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tieredkv.environment.versions import cache_name
from tieredkv.errors import UnsupportedModelError
from tieredkv.models.families.base import VideoFamily
from tieredkv.models.families.decoder import TIERED, Decoder
from tieredkv.models.families.gemma4 import Gemma4, Gemma4Decoder, Gemma4Unified
from tieredkv.models.families.glm4v import Glm4V
from tieredkv.models.families.internvl import InternVL
from tieredkv.models.families.lfm import Lfm3VL, LfmDecoder
from tieredkv.models.families.llava_onevision import LlavaOnevision
from tieredkv.models.families.minicpmv import MiniCPMV46, MiniCPMV47
from tieredkv.models.families.mistral import OneWindowDecoder
from tieredkv.models.families.perception_lm import PerceptionLM
from tieredkv.models.families.qwen2_5_vl import Qwen25VL
from tieredkv.models.families.qwen2_vl import Qwen2VL
from tieredkv.models.families.qwen3_5 import Qwen35, Qwen35Decoder
from tieredkv.models.families.qwen3_vl import Qwen3VL
from tieredkv.models.families.smolvlm import SmolVLM
from tieredkv.models.families.video_llama_3 import VideoLlama3

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES: tuple[VideoFamily, ...] = (
    Qwen2VL(),
    Qwen25VL(),
    Qwen3VL(),
    Qwen35(),
    LlavaOnevision(),
    InternVL(),
    SmolVLM(),
    VideoLlama3(),
    PerceptionLM(),
    MiniCPMV46(),
    MiniCPMV47(),
    Glm4V(),
    Lfm3VL(),
    Gemma4(),
    Gemma4Unified(),
)
"""Families of video models."""
VIDEO_FAMILIES = {kind: family for family in FAMILIES for kind in family.model_types}
"""By the `model_type` of a model's config."""

DECODERS: tuple[Decoder, ...] = (
    Decoder(("llama",)),
    Decoder(("qwen2",)),
    Decoder(("qwen3",)),
    Decoder(
        ("gemma3_text",),
        untiered=("sliding_attention",),
        settings=("query_pre_attn_scalar", "attn_logit_softcapping"),
        mlp_norm="pre_feedforward_layernorm",
    ),
    Gemma4Decoder(("gemma4_text",)),
    Gemma4Decoder(
        ("gemma4_unified_text",),
        settings=("attention_k_eq_v", "num_kv_shared_layers", "per_layer_config"),
        video_only=True,
    ),
    Qwen35Decoder(("qwen3_5_text", "qwen3_5_moe_text")),
    OneWindowDecoder(("mistral",)),
    OneWindowDecoder(("ministral3", "phi3"), mlp_norm=None),  # scaled by position; one projection for all three
    Decoder(("ministral",), untiered=("sliding_attention",)),
    LfmDecoder(("lfm2", "lfm2_moe"), query_norm="q_layernorm"),
    LfmDecoder(("lfm3",), untiered=("conv", "sliding_attention"), tested=("5.23", "5.24")),
    Decoder(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"), video_only=True),
    Decoder(("glm4v_text",), video_only=True, neighbours=True),
    Decoder(
        ("glm4v_moe_text",),
        settings=("num_experts_per_tok", "routed_scaling_factor", "norm_topk_prob", "n_group", "topk_group"),
        video_only=True,
    ),
)
"""Text models: on their own under `TieredCache`, and those of the video families."""

_WHOLE_VIDEO = "its visual tokens attend to those of later frames too, so a video cannot be read in pieces"
_IMAGES_ONLY = "its processor takes images but no video; under TieredCache its text model works"
REFUSED: dict[str, str] = {
    "gemma3": _IMAGES_ONLY,
    "lfm2_vl": _IMAGES_ONLY,
    "mistral3": _IMAGES_ONLY,
    "molmo2": _WHOLE_VIDEO,
    "molmo2_text": _WHOLE_VIDEO,
}
"""Why a kind of model cannot be supported, by its `model_type`."""


def find_decoder(model_type: str | None) -> Decoder | None:
    """What is known of a kind of text model, if it is supported."""
    return next((decoder for decoder in DECODERS if model_type in decoder.model_types), None)


def video_family(config: PreTrainedConfig) -> VideoFamily:
    """The adapter of a video model. Raises `UnsupportedModelError` for any other model."""
    if family := VIDEO_FAMILIES.get(config.model_type):
        return family
    check_refused(config.model_type)
    decoder = find_decoder(config.model_type)
    if decoder and not decoder.video_only:
        raise UnsupportedModelError(
            f"models of type {config.model_type!r} take no video: use model.generate({cache_name()}=TieredCache(...))."
        )
    raise UnsupportedModelError(
        f"models of type {config.model_type!r} are not supported for video: `tieredkv models` lists those that are."
    )


def text_decoder(text: PreTrainedConfig) -> Decoder:
    """What is known of a text model. Raises `UnsupportedModelError` unless `TieredCache` is tested with it.

    text: its config, or the config of a video model's text.
    """
    if decoder := find_decoder(text.model_type):
        return decoder
    check_refused(text.model_type)
    types = sorted(set(getattr(text, "layer_types", None) or ()))
    layers = f" with layers of type {', '.join(types)}" if set(types) - {TIERED} else ""
    raise UnsupportedModelError(
        f"TieredCache does not support decoders of type {text.model_type!r}{layers}: `tieredkv models` lists those "
        "that it does."
    )


def check_refused(model_type: str) -> None:
    """Raise `UnsupportedModelError`, with the reason, for a model that cannot be supported."""
    if reason := REFUSED.get(model_type):
        raise UnsupportedModelError(f"models of type {model_type!r} cannot be supported: {reason}.")
