"""Exact attention over blocks of keys, in plain torch, as prefill uses it on every device.

Shapes: `H` query heads, `K` KV heads, `G = H // K`, `n` queries, `m` keys, `D` head dim. Query head `h` reads KV head
`h // G`. lse is the log-sum-exp of a row's scaled logits, float32.
"""

from __future__ import annotations

from functools import cache

import torch

FLASH_DIM = 256
"""The widest heads that torch's flash attention takes."""


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over one block of keys: output `(H, n, D)` and lse `(H, n)`, to be merged with other blocks.

    query `(H, n, D)`, keys and values `(K, m, D)`. causal: `m == n`, query i sees keys 0..i; otherwise every query sees
    every key.
    """
    heads, n, d = query.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    if causal:
        keys = keys.repeat_interleave(group, dim=0)
        values = values.repeat_interleave(group, dim=0)
    else:  # no mask: the group folds into the query axis and nothing is repeated
        query = query.reshape(kv_heads, group * n, d)
    out, lse = _flash(query, keys, values, scaling, causal)
    return out.reshape(heads, n, d), lse.reshape(heads, n)


def _flash(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's own attention with its lse. The operators are private to torch and used only here.

    query `(A, n, D)`, keys and values `(A, m, D)`; output and lse of the same leading sizes.
    """
    batched = query.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0)
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*batched, 0.0, causal, scale=scaling)
    elif query.dtype == torch.float32 or query.shape[-1] > FLASH_DIM or not _has_flash(query.device):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            *batched, None, True, 0.0, causal, scale=scaling
        )
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*batched, 0.0, causal, False, scale=scaling)
    return out.squeeze(0), lse.squeeze(0)[:, : query.shape[1]].float()


@cache
def _has_flash(device: torch.device) -> bool:
    """Flash attention needs Ampere or newer."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the attention over two disjoint sets of keys, exact up to rounding. The output is float32."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (lse_a - lse).exp().unsqueeze(-1), (lse_b - lse).exp().unsqueeze(-1)
    return out_a.float() * weight_a + out_b.float() * weight_b, lse


def row_weights(
    query: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    scaling: float,
    first_hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention weights of T rows on one block of keys: `(K, G, T, m)`, float32.

    query `(H, T, D)`, keys `(K, m, D)`. lse `(H, T)`: over *all* keys that the rows see, so that the weights of all
    blocks sum to 1. first_hidden `(T,)`: row t sees the keys of the block before that index; None: all of them.
    """
    kv_heads, m, d = keys.shape
    heads, t, _ = query.shape
    folded = query.float().reshape(kv_heads, (heads // kv_heads) * t, d)
    logits = (folded @ keys.float().transpose(1, 2)).mul_(scaling).view(kv_heads, -1, t, m)
    weights = logits.sub_(lse.view(kv_heads, -1, t, 1)).exp_()
    if first_hidden is not None:
        weights.masked_fill_(torch.arange(m, device=keys.device) >= first_hidden.unsqueeze(-1), 0.0)
    return weights
