"""The second tiny model: Qwen3.5, in which every second layer is linear attention (Gated DeltaNet) and the others full.

It answers the same questions about the same videos as the first. Its weights lie beside the package in a checkout of
the repository, not in an installed package.
"""

from typing import Any

from tieredkv.tiny.processor import SECONDS, TOKEN, build_hybrid_tokenizer


def build_config() -> Any:
    """A `Qwen3_5Config` of 3.8 M parameters: linear, full, linear, full; 4 KV heads of 32 dimensions in full layers."""
    from transformers import Qwen3_5Config

    return Qwen3_5Config(
        text_config={
            "vocab_size": len(build_hybrid_tokenizer()),
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "max_position_embeddings": 32_768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.25,  # 8 of 32 dimensions, the architecture's share
            },
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
            "num_position_embeddings": 16,  # one for each patch of a frame
            "out_hidden_size": 256,
            "initializer_range": 0.04,
        },
        image_token_id=TOKEN["<|image_pad|>"],
        video_token_id=TOKEN["<|video_pad|>"],
        vision_start_token_id=TOKEN["<|vision_start|>"],
        vision_end_token_id=TOKEN["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def initialize(model: Any) -> None:
    """Random values that training can start from, where transformers' are made to be loaded over."""
    import math

    import torch

    words = model.get_input_embeddings().weight
    with torch.no_grad():
        seconds = build_hybrid_tokenizer().convert_tokens_to_ids([f"<{second}" for second in range(SECONDS)])
        words[seconds] = words[seconds[0]].clone()  # the same until training tells them apart
    for layer in model.model.language_model.layers:
        with torch.no_grad():
            if hasattr(layer, "self_attn"):
                # The norms bound a score to sqrt(head_dim); times 1.5 each, it can tell one key from thousands.
                layer.self_attn.q_norm.weight.fill_(0.5)
                layer.self_attn.k_norm.weight.fill_(0.5)
            else:
                # Time constants as in Mamba-2, so that states remember; transformers' forget after a token.
                bias = layer.linear_attn.dt_bias
                steps = torch.empty_like(bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
                bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # inverse of softplus
                layer.linear_attn.conv1d.weight.uniform_(-0.5, 0.5)  # torch's own for four taps
