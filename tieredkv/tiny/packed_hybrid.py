"""`packed.forward` for the hybrid: the states of linear layers branch at the end of the video.

A linear layer reads the video once. Its state there, and the last inputs of its convolution, are where each packed
conversation continues from, so conversations do not see each other.

Shapes: `B` videos, `P` prefix tokens, `Q` packed conversation tokens, `C` conversations, `L` tokens of the longest.
"""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention, silu, softplus

from tieredkv.tiny.delta_rule import delta_rule
from tieredkv.tiny.encode import rotate
from tieredkv.tiny.packed import Packed, visible_tokens


class Branches:
    """Between packed rows `(B, Q, ...)` and one row per conversation, `(B * C, L, ...)`, padded at its end."""

    def __init__(self, conversation: torch.Tensor) -> None:
        batch = len(conversation)
        self.conversations = int(conversation.max()) + 1
        there = conversation[:, :, None] == torch.arange(self.conversations, device=conversation.device)
        offset = (there.cumsum(1) - 1).gather(2, conversation.clamp(min=0)[:, :, None])[:, :, 0]
        self.length = int(offset[conversation >= 0].max()) + 1
        row = torch.arange(batch, device=conversation.device)[:, None] * self.conversations + conversation
        spare = batch * self.conversations * self.length  # where padding goes
        self._place = torch.where(conversation >= 0, row * self.length + offset, spare)
        self._batch, self._spare = batch, spare

    def split(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.new_zeros(self._spare + 1, *x.shape[2:]).index_copy(0, self._place.flatten(), x.flatten(0, 1))
        return rows[: self._spare].view(-1, self.length, *x.shape[2:])

    def join(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(0, 1)[self._place.clamp(max=self._spare - 1)]

    def from_prefix(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ...) of the prefixes -> (B * C, ...) of their conversations."""
        return x.repeat_interleave(self.conversations, dim=0)


def forward(language_model: Any, packed: Packed, branches: Branches | None = None) -> torch.Tensor:
    """Final hidden states (B, Q, hidden) of the conversations; logits are their product with the word embeddings."""
    length = packed.prefix.shape[1]
    branches = branches or Branches(packed.conversation)
    x = torch.cat([packed.prefix, language_model.embed_tokens(packed.ids)], dim=1)
    positions = torch.cat([packed.prefix_positions, packed.positions[:, None].expand(-1, 3, -1)], dim=2)
    cos, sin = (each[:, None] for each in language_model.rotary_emb(x.float(), positions.transpose(0, 1)))
    visible = visible_tokens(packed)

    for number, layer in enumerate(language_model.layers):
        last = number == len(language_model.layers) - 1
        first = length if last else 0
        normal = layer.input_layernorm(x)
        if hasattr(layer, "linear_attn"):
            mixed = _linear(layer.linear_attn, normal, length, branches)[:, first:]
        else:
            mixed = _full(layer.self_attn, normal, length, first, cos, sin, visible)
        x = x[:, first:] + mixed
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return language_model.norm(x)


def _full(
    attention: Any,
    x: torch.Tensor,
    length: int,
    first: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    visible: torch.Tensor,
) -> torch.Tensor:
    """Gated attention with normalised queries and keys, of which the first dimensions are rotated."""
    batch, dim = x.shape[0], attention.head_dim
    q, gate = attention.q_proj(x[:, first:]).view(batch, x.shape[1] - first, -1, 2 * dim).chunk(2, dim=-1)
    q = attention.q_norm(q).transpose(1, 2)
    k = attention.k_norm(attention.k_proj(x).view(batch, x.shape[1], -1, dim)).transpose(1, 2)
    v = attention.v_proj(x).view(batch, x.shape[1], -1, dim).transpose(1, 2)
    rotated = cos.shape[-1]
    q, k = (
        torch.cat([rotate(t[..., :rotated], c, s), t[..., rotated:]], dim=-1)
        for t, c, s in ((q, cos[:, :, first:], sin[:, :, first:]), (k, cos, sin))
    )
    k, v = (t.repeat_interleave(attention.num_key_value_groups, dim=1) for t in (k, v))
    mixed = scaled_dot_product_attention(q[:, :, length - first :], k, v, attn_mask=visible)
    if first < length:
        part = (q[:, :, :length], k[:, :, :length], v[:, :, :length])
        mixed = torch.cat([scaled_dot_product_attention(*part, is_causal=True), mixed], dim=2)
    return attention.o_proj(mixed.transpose(1, 2).flatten(2) * gate.flatten(2).sigmoid())


def _linear(layer: Any, x: torch.Tensor, length: int, branches: Branches) -> torch.Tensor:
    """Gated DeltaNet: the video from an empty state, each conversation from the video's."""
    inputs = layer.in_proj_qkv(x)
    log_decay = -layer.A_log.float().exp() * softplus(layer.in_proj_a(x).float() + layer.dt_bias)
    beta = layer.in_proj_b(x).float().sigmoid()

    taps = layer.conv_kernel_size - 1
    video = inputs[:, :length]
    empty = video.new_zeros(video.shape[0], taps, video.shape[2])
    output, state = _mix(layer, torch.cat([empty, video], dim=1), log_decay[:, :length], beta[:, :length], None)
    rows = [branches.from_prefix(video[:, length - taps :]), branches.split(inputs[:, length:])]
    decays, betas = (branches.split(each[:, length:]) for each in (log_decay, beta))
    answers, _ = _mix(layer, torch.cat(rows, dim=1), decays, betas, branches.from_prefix(state))
    output = torch.cat([output, branches.join(answers)], dim=1)
    z = layer.in_proj_z(x).view_as(output)
    return layer.out_proj(layer.norm(output, z).flatten(2))


def _mix(
    layer: Any, inputs: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolution and delta rule of (N, taps + L) inputs: outputs (N, L, H, V) and the state after them."""
    weight = layer.conv1d.weight[:, 0]  # (channels, kernel)
    count = inputs.shape[1] - weight.shape[1] + 1
    mixed = silu(sum(inputs[:, tap : tap + count] * weight[:, tap] for tap in range(weight.shape[1])))
    q, k, v = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    q, k = (t.unflatten(-1, (-1, layer.head_k_dim)).float() for t in (q, k))
    q, k = (t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
    groups = layer.num_v_heads // layer.num_k_heads
    q, k = (t.repeat_interleave(groups, dim=2).transpose(1, 2) for t in (q * layer.head_k_dim**-0.5, k))
    v = v.unflatten(-1, (-1, layer.head_v_dim)).transpose(1, 2)
    output, state = delta_rule(q, k, v, log_decay.transpose(1, 2), beta.transpose(1, 2), state)
    return output.transpose(1, 2), state
