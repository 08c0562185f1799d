"""Runs the decoder over videos with many conversations packed after each: one pass over a video, many labels.

Equals the stock forward of each conversation after its video alone (tested). The last layer is not computed for the
video's rows, because the loss does not depend on them.

Shapes: `B` videos, `P` prefix tokens (system turn and video), `Q` packed conversation tokens, `D` head dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from tieredkv.tiny.encode import rotate


@dataclass(frozen=True)
class Packed:
    """One batch. A conversation's token attends to the whole prefix and to the conversation's earlier tokens."""

    prefix: torch.Tensor  # (B, P, hidden) embeddings
    prefix_positions: torch.Tensor  # (B, 3, P)
    ids: torch.Tensor  # (B, Q)
    positions: torch.Tensor  # (B, Q), the same on all three axes, as for text
    conversation: torch.Tensor  # (B, Q) number of the conversation a token belongs to


def _angles(positions: torch.Tensor, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 3, N) positions -> cos, sin (B, 1, N, D); each section of frequencies uses one axis."""
    head_dim = config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    parts = (positions[..., None].float() * rope["rope_theta"] ** -exponents).split(rope["mrope_section"], dim=-1)
    angles = torch.cat([part[:, i % 3] for i, part in enumerate(parts)], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def visible_tokens(packed: Packed) -> torch.Tensor:
    """Mask `(B, 1, Q, T + Q)` of what the conversations attend to: their prefix of T tokens, and themselves so far."""
    batch, length, _ = packed.prefix.shape
    count = packed.ids.shape[1]
    earlier = torch.ones(count, count, dtype=torch.bool, device=packed.ids.device).tril()
    own = (packed.conversation[:, :, None] == packed.conversation[:, None, :]) & earlier
    return torch.cat([own.new_ones(batch, count, length), own], dim=2)[:, None]


def forward(language_model: Any, packed: Packed) -> torch.Tensor:
    """Final hidden states (B, Q, hidden) of the conversations; logits are their product with the word embeddings."""
    config = language_model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    batch, length, _ = packed.prefix.shape

    x = torch.cat([packed.prefix, language_model.embed_tokens(packed.ids)], dim=1)
    positions = torch.cat([packed.prefix_positions, packed.positions[:, None].expand(-1, 3, -1)], dim=2)
    cos, sin = _angles(positions, config)
    visible = visible_tokens(packed)

    for number, layer in enumerate(language_model.layers):
        last = number == len(language_model.layers) - 1
        first = length if last else 0
        normal = layer.input_layernorm(x)
        q = (
            layer.self_attn.q_proj(normal[:, first:])
            .view(batch, -1, heads, config.hidden_size // heads)
            .transpose(1, 2)
        )
        k = layer.self_attn.k_proj(normal).view(batch, -1, kv_heads, q.shape[-1]).transpose(1, 2)
        v = layer.self_attn.v_proj(normal).view(batch, -1, kv_heads, q.shape[-1]).transpose(1, 2)
        q, k = rotate(q, cos[:, :, first:], sin[:, :, first:]), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        mixed = scaled_dot_product_attention(q[:, :, length - first :], k, v, attn_mask=visible)
        if not last:
            part = (q[:, :, :length], k[:, :, :length], v[:, :, :length])
            mixed = torch.cat([scaled_dot_product_attention(*part, is_causal=True), mixed], dim=2)
        x = x[:, first:] + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return language_model.norm(x)
