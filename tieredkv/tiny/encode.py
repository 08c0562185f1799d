"""The vision tower over many grid steps at once: the stock computation without its loop over windows.

A frame pair is one attention window and one full-attention group here: grid steps never attend to each other.
Shapes: `S` grid steps (frame pairs), 16 patches and 4 merged tokens per step.
"""

from typing import Any

import numpy as np
import torch

from tieredkv.tiny.draw import SIZE

PATCH, MERGE, PAIR = 14, 2, 2
SIDE = SIZE // PATCH
TOKENS = (SIDE // MERGE) ** 2  # per grid step

_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float32, device="cpu").view(3, 1, 1)
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float32, device="cpu").view(3, 1, 1)


def to_pairs(frames: np.ndarray) -> torch.Tensor:
    """`(T, 56, 56, 3)` uint8 -> `(T // 2, 2, 3, 56, 56)` uint8; an odd last frame is dropped."""
    pairs = torch.from_numpy(frames[: len(frames) // PAIR * PAIR]).permute(0, 3, 1, 2)
    return pairs.reshape(-1, PAIR, 3, SIZE, SIZE)


def to_patches(pairs: torch.Tensor) -> torch.Tensor:
    """`(S, 2, 3, 56, 56)` values 0 .. 255 -> `(S, 16, 1176)` float32, as the video processor does."""
    device = pairs.device
    x = (pairs.float() / 255 - _MEAN.to(device)) / _STD.to(device)
    blocks = SIDE // MERGE
    x = x.view(-1, PAIR, 3, blocks, MERGE, PATCH, blocks, MERGE, PATCH)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(len(pairs), SIDE * SIDE, -1)


def _order(device: torch.device) -> torch.Tensor:
    """`(16,)` places in a frame, row by row, of the patches in merge-block order."""
    places = torch.arange(SIDE * SIDE, device=device).view(SIDE // MERGE, MERGE, SIDE // MERGE, MERGE)
    return places.transpose(1, 2).flatten()


def _rotation(head_dim: int, theta: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `(16, head_dim)` of the tower's 2-D rotary positions, patches in merge-block order."""
    order = _order(device)
    frequencies = theta ** -(torch.arange(0, head_dim // 2, 2, device=device).float() / (head_dim // 2))
    angles = torch.cat([(order // SIDE)[:, None] * frequencies, (order % SIDE)[:, None] * frequencies], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in the half-split layout, in float32, back in x's dtype."""
    half = x.shape[-1] // 2
    values = x.float()
    turned = torch.cat([-values[..., half:], values[..., :half]], dim=-1)
    return (values * cos + turned * sin).to(x.dtype)


def encode(visual: Any, patches: torch.Tensor) -> torch.Tensor:
    """`(S, 16, 1176)` patches -> `(S, 4, hidden)` features; differentiable, honours autocast."""
    steps, count, _ = patches.shape
    attention = visual.blocks[0].attn
    cos, sin = _rotation(attention.head_dim, 10_000.0, patches.device)
    projection = visual.patch_embed.proj
    x = torch.nn.functional.linear(patches, projection.weight.flatten(1), projection.bias)
    if hasattr(visual, "pos_embed"):  # Qwen3.5: one learned vector for each of the 16 places
        x = x + visual.pos_embed.weight[_order(patches.device)]
    for block in visual.blocks:
        qkv = block.attn.qkv(block.norm1(x)).view(steps, count, 3, attention.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # Not the fused kernel, whose backward pass is three times slower for 16 patches.
        scores = rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(-1, -2) * attention.scaling
        mixed = scores.softmax(-1).to(v.dtype) @ v
        x = x + block.attn.proj(mixed.transpose(1, 2).reshape(steps, count, -1))
        x = x + block.mlp(block.norm2(x))
    return visual.merger(x.reshape(steps * count, -1)).view(steps, TOKENS, -1)
