"""The tiny model: its configuration, and loading the trained weights that ship with the package."""

from pathlib import Path
from typing import Any

from tieredkv.tiny import hybrid
from tieredkv.tiny.processor import TOKEN, build_processor

ARCHITECTURES = ("qwen2_5_vl", "qwen3_5")
"""The model type that ships with the package, and the hybrid of linear and full attention."""

PATH = Path(__file__).parent / "weights"
"""A folder in the layout of a model hub: configurations, bf16 weights, tokenizer and processor files."""

FPS = 4.0
"""Frames per second to sample videos at. Two frames are one grid step: half a second, four tokens."""


def build_config() -> Any:
    """A `Qwen2_5_VLConfig` of 3.4 M parameters: 4 layers, 8 query heads, 4 KV heads of 32 dimensions."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(TOKEN),
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
            "initializer_range": 0.04,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": TOKEN["<|im_end|>"],
            "pad_token_id": TOKEN["<|endoftext|>"],
        },
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [2],
            "out_hidden_size": 256,
            "tokens_per_second": 4,  # temporal positions advance by 2 per half-second grid step
            "initializer_range": 0.04,
        },
        image_token_id=TOKEN["<|image_pad|>"],
        video_token_id=TOKEN["<|video_pad|>"],
        vision_start_token_id=TOKEN["<|vision_start|>"],
        vision_end_token_id=TOKEN["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_model(architecture: str = "qwen2_5_vl") -> Any:
    """The model with random weights, float32, from torch's global generator. architecture: one of `ARCHITECTURES`."""
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration, Qwen3_5ForConditionalGeneration

    if architecture == "qwen3_5":
        model: Any = Qwen3_5ForConditionalGeneration(hybrid.build_config())
        hybrid.initialize(model)
    else:
        model = Qwen2_5_VLForConditionalGeneration(build_config())
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=32,
        eos_token_id=TOKEN["<|im_end|>"],
        pad_token_id=TOKEN["<|endoftext|>"],
    )
    return model


def save(model: Any, path: Path) -> None:
    """Write model (as bf16) and processor so that transformers' `from_pretrained` can load both."""
    import copy

    import torch

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(path)
    build_processor(model.config.model_type).save_pretrained(path)
    (path / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only


def load(dtype: Any = None, path: str | Path = PATH) -> tuple[Any, Any]:
    """The trained model (float32 by default, in eval mode, on the CPU) and its processor."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype or torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(path)
