"""A tiny random model and processor of every supported family, built offline."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from tieredkv.models.families import VIDEO_FAMILIES
from tieredkv.video.frames import Sampled

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<image>",
    "<video>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "</image>",
    "<slice>",
    "</slice>",
    "<image_id>",
    "</image_id>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|video|>",
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}VIDEO{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
QWEN3_5 = {
    **TEXT,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 3, 3],
        "mrope_interleaved": True,
    },
}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.1,
}


@cache
def sampled_of(frames: int, height: int, width: int, max_pixels: int | None = None) -> Sampled:
    """What is known of frames at 4 per second."""
    return Sampled(frames, height, width, 4.0, 0.0, frames / 4, max_pixels)


def tokenizer() -> Any:
    """Byte-level BPE with merges across the boundary between the template's text and the text inside a video."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [f"user\n{part}\nwhat" for n in range(99) for part in (f"<{n / 4:.1f} seconds>", f"Frame{n}: ")]
    texts += [f"\nFrame from {n:02d}:{n:02d}:" for n in range(60)] + ["video.\n\nFrame from 00:00:", "\n\nwhat is it ?"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=list(SPECIAL)
    )
    made.start_image_token, made.end_image_token = "<img>", "</img>"
    made.context_image_token, made.video_token = "<IMG_CONTEXT>", "<video>"
    for name in ("start_image_token", "end_image_token", "context_image_token"):
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(getattr(made, name)))
    return made


def _plain_tokenizer() -> Any:
    """Without the names that only InternVL's has."""
    import copy

    made = copy.deepcopy(tokenizer())
    for name in ("start_image_token", "end_image_token", "context_image_token"):
        delattr(made, name)
        delattr(made, f"{name}_id")
    del made.video_token
    return made


def _ids() -> dict[str, int]:
    return {name: tokenizer().convert_tokens_to_ids(name) for name in SPECIAL}


def _qwen(name: str) -> tuple[Any, Any]:
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    ids = _ids()
    text = {**TEXT, "vocab_size": len(tokenizer())}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "initializer_range": 0.1}
    if name == "qwen2_vl":
        prefix, vision = "Qwen2VL", {**vision, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    elif name == "qwen2_5_vl":
        prefix = "Qwen2_5_VL"
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "fullatt_block_indexes": [1]}
        vision |= {"window_size": 56, "tokens_per_second": 2}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "patch_size": 14}
        vision["num_position_embeddings"], rope["mrope_interleaved"] = 16, True
        if name == "qwen3_vl":
            prefix, text["head_dim"], vision["deepstack_visual_indexes"] = "Qwen3VL", 16, [0, 1]
        else:  # every second layer is full attention, which rotates a half of the head
            prefix, text["head_dim"], rope["partial_rotary_factor"] = "Qwen3_5", 32, 0.5
            text |= {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
            text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
            text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
        if name == "qwen3_5_moe":
            prefix = "Qwen3_5Moe"
            text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
            text["shared_expert_intermediate_size"] = text.pop("intermediate_size")
    config = getattr(transformers, f"{prefix}Config")(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 8}
    kind: Any = Qwen2VLVideoProcessor
    if name.startswith("qwen3"):  # its limits are for the whole video: frames of long videos shrink
        kind, size = transformers.Qwen3VLVideoProcessor, {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 100}
    video = kind(size=size, patch_size=14, do_sample_frames=False)
    template = QWEN_TEMPLATE.replace("VIDEO", "<|vision_start|><|video_pad|><|vision_end|>")
    picture = "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    template = template.replace("{% else %}", f"{picture}{{% else %}}")
    processor_prefix = "Qwen3VL" if name.startswith("qwen3") else prefix
    processor = getattr(transformers, f"{processor_prefix}Processor")(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=_plain_tokenizer(),
        video_processor=video,
        chat_template=template,
    )
    return getattr(transformers, f"{prefix}ForConditionalGeneration")(config), processor


def _llava_onevision() -> tuple[Any, Any]:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

    ids = _ids()
    config = LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer())},
        vision_config={**SIGLIP, "model_type": "siglip_vision_model", "image_size": 42, "patch_size": 14,
                       "vision_use_head": False},
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=[[42, 42]],
        tie_word_embeddings=False,
    )  # fmt: skip
    processor = LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size={"height": 42, "width": 42}),
        tokenizer=_plain_tokenizer(),
        video_processor=transformers.LlavaOnevisionVideoProcessor(
            size={"height": 42, "width": 42}, do_sample_frames=False
        ),
        num_image_tokens=9,
        vision_feature_select_strategy="full",
        chat_template=QWEN_TEMPLATE.replace("VIDEO", "<video>\n"),
        image_token="<image>",
        video_token="<video>",
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def _internvl() -> tuple[Any, Any]:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor

    config = InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer())},
        vision_config={**SIGLIP, "model_type": "internvl_vision", "image_size": [56, 56], "patch_size": [14, 14]},
        image_token_id=_ids()["<IMG_CONTEXT>"],
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    processor = InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size={"height": 56, "width": 56}),
        tokenizer=tokenizer(),
        video_processor=transformers.InternVLVideoProcessor(size={"height": 56, "width": 56}, do_sample_frames=False),
        image_seq_length=4,
        chat_template=QWEN_TEMPLATE.replace("VIDEO", "<video>\n"),
    )
    return InternVLForConditionalGeneration(config), processor


def _smolvlm() -> tuple[Any, Any]:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMProcessor

    config = SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(tokenizer())},
        vision_config={**SIGLIP, "image_size": 56, "patch_size": 14},
        image_token_id=_ids()["<image>"],
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    sizes = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    processor = SmolVLMProcessor(
        image_processor=transformers.SmolVLMImageProcessor(**sizes),
        tokenizer=_plain_tokenizer(),
        video_processor=transformers.SmolVLMVideoProcessor(do_sample_frames=False, **sizes),
        image_seq_len=4,
    )
    return SmolVLMForConditionalGeneration(config), processor


def _video_llama_3() -> tuple[Any, Any]:
    from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration, VideoLlama3Processor

    ids = _ids()
    config = VideoLlama3Config(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer())},
        vision_config={**SIGLIP, "patch_size": 14},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        tie_word_embeddings=False,
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 100}  # for the whole video
    processor = VideoLlama3Processor(
        image_processor=transformers.VideoLlama3ImageProcessor(),
        tokenizer=_plain_tokenizer(),
        video_processor=transformers.VideoLlama3VideoProcessor(size=size),
        chat_template=QWEN_TEMPLATE.replace("VIDEO", "<|vision_start|><|video_pad|><|vision_end|>"),
    )
    return VideoLlama3ForConditionalGeneration(config), processor


def _perception_lm() -> tuple[Any, Any]:
    """With timm's Perception Encoder, as in the published models."""
    from transformers import PerceptionLMConfig, PerceptionLMForConditionalGeneration, PerceptionLMProcessor

    pytest.importorskip("timm")
    ids = _ids()
    tower = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": [56, 56], "ref_feat_shape": [4, 4]}
    config = PerceptionLMConfig(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(tokenizer())},
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {**tower, "global_pool": "", "use_post_transformer_norm": False, "init_values": 0.1},
        },
        projector_pooling_ratio=2,
        image_token_id=ids["<image>"],
        video_token_id=ids["<video>"],
        tie_word_embeddings=False,
    )
    size = {"height": 56, "width": 56}
    own = _plain_tokenizer()
    for name in ("image", "video"):
        setattr(own, f"{name}_token", f"<{name}>")
        setattr(own, f"{name}_token_id", ids[f"<{name}>"])
    processor = PerceptionLMProcessor(
        image_processor=transformers.PerceptionLMImageProcessor(tile_size=56),
        tokenizer=own,
        video_processor=transformers.PerceptionLMVideoProcessor(size=size),
        patch_size=14,
        chat_template=QWEN_TEMPLATE.replace("VIDEO", "<video>"),
    )
    return PerceptionLMForConditionalGeneration(config), processor


def _minicpm(version: str) -> tuple[Any, Any]:
    ids, prefix = _ids(), f"MiniCPMV{version}"
    markers = {"image_start": "<image>", "image_end": "</image>", "slice_start": "<slice>", "slice_end": "</slice>"}
    placed = {f"{name}_id": ids[token] for name, token in markers.items()}
    placed["newline_id"] = tokenizer()("\n").input_ids[0]
    config = getattr(transformers, f"{prefix}Config")(
        text_config={**QWEN3_5, "model_type": "qwen3_5_text", "vocab_size": len(tokenizer())},
        vision_config={**SIGLIP, "image_size": 980, "patch_size": 14},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        insert_layer_id=0,
        tie_word_embeddings=False,
        **(placed if version == "4_7" else {}),
    )
    words = _plain_tokenizer()
    markers |= {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    markers |= {"image_id_start": "<image_id>", "image_id_end": "</image_id>"}
    for name, token in markers.items():
        setattr(words, f"{name}_token", token)
        setattr(words, f"{name}_token_id", ids[token])
    size = {"scale_resolution": 140, "patch_size": 14}
    processor = getattr(transformers, f"{prefix}Processor")(
        image_processor=transformers.MiniCPMV4_6ImageProcessor(**size),
        video_processor=transformers.MiniCPMV4_6VideoProcessor(do_sample_frames=False, **size),
        tokenizer=words,
        chat_template=QWEN_TEMPLATE.replace("VIDEO", "<|video_pad|>\n"),
    )
    return getattr(transformers, f"{prefix}ForConditionalGeneration")(config), processor


def _glm(name: str) -> tuple[Any, Any]:
    ids = _ids()
    prefix = {"glm4v": "Glm4v", "glm46v": "Glm46V", "glm4v_moe": "Glm4vMoe"}[name]
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
    text = {**TEXT, "vocab_size": len(tokenizer()), "rope_parameters": rope}
    if name == "glm4v_moe":  # the first layer is dense
        text |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1}
    elif name == "glm46v":
        text["model_type"] = "glm4v_text"
    vision = {"depth": 2, "num_heads": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {"image_size": 56, "initializer_range": 0.1}
    kind = {"model_type": "glm4v_vision"} if name == "glm46v" else {}
    config = getattr(transformers, f"{prefix}Config")(
        text_config=text,
        vision_config={**vision, **kind},
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        tie_word_embeddings=False,
    )
    # Its limits are for the whole video: frames of short videos grow.
    size = {"shortest_edge": 28 * 28 * 200, "longest_edge": 28 * 28 * 1000}
    parts = "Glm46V" if name == "glm46v" else "Glm4v"
    processor = getattr(transformers, f"{parts}Processor")(
        image_processor=getattr(transformers, f"{parts}ImageProcessor")(),
        tokenizer=_plain_tokenizer(),
        video_processor=getattr(transformers, f"{parts}VideoProcessor")(size=size, do_sample_frames=False),
        chat_template=QWEN_TEMPLATE.replace("VIDEO", "<|begin_of_video|><|video|><|end_of_video|>"),
    )
    return getattr(transformers, f"{prefix}ForConditionalGeneration")(config), processor


def _lfm3_vl() -> tuple[Any, Any]:
    ids = _ids()
    text = {**TEXT, "num_hidden_layers": 4, "vocab_size": len(tokenizer()), "head_dim": 16, "sliding_window": 33}
    text["layer_types"] = ["conv", "full_attention", "sliding_attention", "full_attention"]
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 1, "patch_size": 14, "layer_types": ["conv", "full_attention"]}
    config = transformers.Lfm3VlConfig(
        text_config={**text, "model_type": "lfm3"},
        vision_config={**vision, "initializer_range": 0.1},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        projector_hidden_size=96,
        tie_word_embeddings=False,
    )
    processor = transformers.Lfm3VlProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=_plain_tokenizer(),
        video_processor=transformers.Qwen3VLVideoProcessor(
            size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 100}, patch_size=14, do_sample_frames=False
        ),
        chat_template=QWEN_TEMPLATE.replace("VIDEO", "<|video_pad|>"),
    )
    return transformers.Lfm3VlForConditionalGeneration(config), processor


def gemma4(own_embeddings: bool = True, shared: bool = True, whole_frames: bool = True, experts: bool = True) -> Any:
    """Released models have either the first two (E2B, E4B) or the third (31B), and one the fourth as well (26B-A4B)."""
    text: dict[str, Any] = {"hidden_size_per_layer_input": 8 if own_embeddings else 0}
    if shared:
        text |= {"num_kv_shared_layers": 3, "use_double_wide_mlp": True}
    if whole_frames:
        text |= {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "use_bidirectional_attention": "vision"}
    if experts:
        text |= {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}
    vision = {**SIGLIP, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64}
    audio = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16}
    return _gemma4("Gemma4", text, vision, audio)


def _gemma4_unified() -> tuple[Any, Any]:
    text = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "use_bidirectional_attention": "vision"}
    vision = {"mm_embed_dim": 64, "output_proj_dims": 64, "mm_posemb_size": 64, "initializer_range": 0.1}
    return _gemma4("Gemma4Unified", text, vision, {"audio_embed_dim": 16})


def _gemma4(prefix: str, text: Any, vision: Any, audio: Any) -> tuple[Any, Any]:
    from importlib import import_module

    words = _plain_tokenizer()
    named = {"image": "<|image_pad|>", "boi": "<|vision_start|>", "eoi": "<|vision_end|>"}
    named |= {"audio": "<image>", "boa": "<img>", "eoa": "</img>"}
    for key, token in named.items():
        setattr(words, f"{key}_token", token)
    words.image_token_id = words.convert_tokens_to_ids("<|image_pad|>")
    module = "gemma4" if prefix == "Gemma4" else "gemma4_unified"
    videos: Any = import_module(f"transformers.models.{module}.video_processing_{module}")
    videos._SUPPORTED_SOFT_TOKENS = (7,)  # its smallest frames have 70 tokens
    patches = {"patch_size": 7, "pooling_kernel_size": 2}
    processor = getattr(transformers, f"{prefix}Processor")(
        feature_extractor=getattr(transformers, f"{prefix}AudioFeatureExtractor")(),
        image_processor=getattr(transformers, f"{prefix}ImageProcessor")(),
        tokenizer=words,
        video_processor=getattr(transformers, f"{prefix}VideoProcessor")(
            **patches, max_soft_tokens=7, do_sample_frames=False
        ),
        chat_template=QWEN_TEMPLATE.replace("VIDEO", "<|video|>"),
    )
    kinds = ["full", "sliding", "full", "sliding", "full", "full"]
    text = {**TEXT, "num_hidden_layers": 6, "layer_types": [f"{kind}_attention" for kind in kinds], **text}
    text |= {"vocab_size": len(words), "final_logit_softcapping": 30.0}
    text |= {"sliding_window": 33, "head_dim": 16, "global_head_dim": 32}
    if prefix == "Gemma4":
        text["vocab_size_per_layer_input"] = len(words)
    config = getattr(transformers, f"{prefix}Config")(
        text_config=text,
        vision_config={**vision, **patches},
        audio_config=audio,
        image_token_id=words.image_token_id,
        video_token_id=processor.video_token_id,
        tie_word_embeddings=False,
    )
    return getattr(transformers, f"{prefix}ForConditionalGeneration")(config), processor


BUILD = {
    "qwen2_vl": lambda: _qwen("qwen2_vl"),
    "qwen2_5_vl": lambda: _qwen("qwen2_5_vl"),
    "qwen3_vl": lambda: _qwen("qwen3_vl"),
    "qwen3_5": lambda: _qwen("qwen3_5"),
    "qwen3_5_moe": lambda: _qwen("qwen3_5_moe"),
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "smolvlm": _smolvlm,
    "video_llama_3": _video_llama_3,
    "perception_lm": _perception_lm,
    "minicpmv4_6": lambda: _minicpm("4_6"),
    "minicpmv4_7": lambda: _minicpm("4_7"),
    "glm4v": lambda: _glm("glm4v"),
    "glm46v": lambda: _glm("glm46v"),
    "glm4v_moe": lambda: _glm("glm4v_moe"),
    "lfm3_vl": _lfm3_vl,
    "gemma4": gemma4,
    "gemma4_unified": _gemma4_unified,
}


@cache
def build(name: str) -> tuple[Any, Any]:
    """Model and processor of a family by its `model_type`.

    Skips the test if the installed transformers is older than the family.
    """
    oldest = VIDEO_FAMILIES[name].tested[0]
    if Version(transformers.__version__) < Version(oldest):
        pytest.skip(f"{name} needs transformers {oldest}")
    return sharpened(BUILD[name])


def sharpened(make: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """A random model and its processor; weights sharpened so that errors show."""
    torch.manual_seed(3)
    model, processor = make()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("A_log"):  # states that remember hundreds of tokens
                parameter.uniform_(-8, -4)
            elif "norm" not in key:
                parameter.mul_(2.0)
    model.generation_config.eos_token_id = None
    return model.eval(), processor
