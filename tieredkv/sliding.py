"""Layers that see only the last tokens: kept whole on the device, as transformers keeps them."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from tieredkv.attention import interface
from tieredkv.errors import OptionError


class SlidingLayer(DynamicSlidingWindowLayer):
    """transformers' own layer, which attends through our attention function because the whole decoder does.

    It holds `sliding_window` tokens at most, whatever the length of the prompt, which do not count against `gpu_kv_gb`.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return interface.tag(keys, self), values

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        """query `(H, n, D)`, the last n of the m tokens of keys and values `(K, m, D)` -> `(H, n, D)`."""
        groups = query.shape[0] // keys.shape[0]
        place = torch.arange(keys.shape[1], device=keys.device)
        back = place[-query.shape[1] :, None] - place
        return torch.nn.functional.scaled_dot_product_attention(
            query.unsqueeze(0),
            keys.repeat_interleave(groups, 0).unsqueeze(0),
            values.repeat_interleave(groups, 0).unsqueeze(0),
            attn_mask=(back >= 0) & (back < self.sliding_window),
            scale=scaling,
        )[0]

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens. Raises `OptionError` where some of those to be seen are gone."""
        length = self.get_seq_length()
        if tokens >= length:
            return
        if length >= self.sliding_window:
            raise OptionError(
                f"a model with sliding windows cannot go back to {tokens} of {length} tokens: what lay within the "
                "window then is gone. Start another cache."
            )
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[:, :, :tokens], self.values[:, :, :tokens]
        self.cumulative_length = tokens

    def close(self) -> None:
        """Free the layer's memory."""
        self.keys = self.values = None
