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

    query `(H, n, D)`, keys and values `(K, m, D)`. causal: the queries are those of the last n keys, and each sees its
    own key and those before; otherwise every query sees every key. The output is float32 or of the query's dtype.
    """
    if _by_flash(query):  # takes groups as they are, and aligns a causal mask to the last key
        return _flash(query, keys, values, scaling, causal)
    n, m = query.shape[1], keys.shape[1]
    if not causal:
        return _folded(query, keys, values, scaling)
    last = [part[:, m - n :].repeat_interleave(len(query) // len(keys), dim=0) for part in (keys, values)]
    own = _flash(query, last[0], last[1], scaling, causal=True)
    return own if m == n else merge(*own, *_folded(query, keys[:, : m - n], values[:, : m - n], scaling))


def _folded(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` without a mask: the group folds into the query axis, and nothing is repeated."""
    heads, n, d = query.shape
    out, lse = _flash(query.reshape(len(keys), -1, d), keys, values, scaling, causal=False)
    return out.reshape(heads, n, d), lse.reshape(heads, n)


def _by_flash(query: torch.Tensor) -> bool:
    """Whether torch's flash attention for cards computes it; the kernels that stand in for it know no groups."""
    narrow = query.dtype != torch.float32 and query.shape[-1] <= FLASH_DIM
    return query.device.type != "cpu" and narrow and _has_flash(query.device)


def _flash(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's own attention with its lse. The operators are private to torch and used only here.

    query `(A, n, D)`, keys and values `(A, m, D)`, or with `_by_flash` fewer; output and lse of the query's leading
    sizes.
    """
    batched = query.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0)
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*batched, 0.0, causal, scale=scaling)
    elif _by_flash(query):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*batched, 0.0, causal, False, scale=scaling)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            *batched, None, True, 0.0, causal, scale=scaling
        )
    return out.squeeze(0), lse.squeeze(0)[:, : query.shape[1]].float()


@cache
def _has_flash(device: torch.device) -> bool:
    """Flash attention needs Ampere or newer."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the attention over two disjoint sets of keys, exact up to rounding. The output is float32."""
    share = torch.sigmoid(lse_b - lse_a).unsqueeze(-1)
    return torch.lerp(out_a.float(), out_b.float(), share), torch.logaddexp(lse_a, lse_b)


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
