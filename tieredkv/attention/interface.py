"""The attention function and mask function registered with transformers under `NAME`.

A `TieredCache` returns from `update()` only the *new* keys, tagged with the layer that holds the rest. Every model
family passes that very tensor to the attention function, which lets the layer attend. Nothing is patched.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from tieredkv.environment.ambient import attended_dtype, without_gradient
from tieredkv.environment.versions import cache_name
from tieredkv.errors import OptionError, UnsupportedModelError

NAME = "tieredkv"
_TAG = "tieredkv_layer"
AHEAD = torch.int32
"""The dtype by which a mask `(1, 1, n, 1)` is known to hold the number of tokens after it that each token sees."""


class AttendingLayer(Protocol):
    """The cache layer that keys are tagged with."""

    @property
    def sliding_window(self) -> int | None:
        """How many tokens a token sees, itself included; None: all."""

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        ahead: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cache new tokens' keys and values `(K, n, D)` and attend with query `(H, n, D)`: output `(H, n, D)`.

        ahead: `(n,)`, how many later tokens of the call each one sees, all in one run of tokens; None: none.
        """


def tag(keys: torch.Tensor, layer: AttendingLayer) -> torch.Tensor:
    """A view of `keys` by which the attention function finds `layer`."""
    view = keys.view_as(keys)
    setattr(view, _TAG, layer)
    return view


def tiered_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: query `(1, H, n, D)`, key and value `(1, K, n, D)` -> `(1, n, H, D)`."""
    layer = getattr(key, _TAG, None)
    if layer is None:
        raise RuntimeError(
            "attention 'tieredkv' was called with keys that do not come from a TieredCache: pass "
            f"{cache_name()}=TieredCache(model.config, ...) and leave use_cache on."
        )
    if sliding_window != layer.sliding_window:
        raise UnsupportedModelError(
            f"a layer attends within a window of {sliding_window} tokens, but its config implies "
            f"{layer.sliding_window}: such a model is not supported."
        )
    ahead = None
    if attention_mask is not None:
        if attention_mask.dtype != AHEAD:
            raise OptionError("attention 'tieredkv' is causal and takes no prepared attention mask: pass none.")
        ahead = attention_mask[0, 0, :, 0]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast, cast all three to its dtype, and so the output, as torch's own attention does.
    query, key, value = (part.to(attended_dtype(part)) for part in (query, key, value))
    out = without_gradient(layer.attend(query[0], key[0], value[0], scaling, ahead), query)
    return out.transpose(0, 1).unsqueeze(0).contiguous(), None


def tiered_mask(
    batch_size: int, attention_mask: torch.Tensor | None = None, use_vmap: bool = False, **kwargs: Any
) -> None:
    """No mask, which is right for one causal sequence without padding; raises for anything else."""
    if batch_size != 1:
        raise OptionError(f"TieredCache holds one sequence, got a batch of {batch_size}: run them one at a time.")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise OptionError("TieredCache takes no padding: pass one sequence without padded tokens.")
    if use_vmap:
        raise UnsupportedModelError(
            "the model changes its causal mask (bidirectional images?), which is not supported."
        )


AttentionInterface.register(NAME, tiered_attention)
AttentionMaskInterface.register(NAME, tiered_mask)
