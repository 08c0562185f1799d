"""Layers that see only the last tokens: kept whole on the device, as transformers keeps them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from tieredkv.attention import interface
from tieredkv.cache.layer_order import LayerOrder
from tieredkv.environment.ambient import settled
from tieredkv.errors import OptionError

ROWS = 1024
"""Queries that attend at a time."""


class SlidingLayer(DynamicSlidingWindowLayer):
    """transformers' own layer, attending through our attention function because the whole decoder does.

    It holds at most `sliding_window` tokens, whatever the length of the prompt. They do not count against `gpu_kv_gb`.
    """

    def __init__(self, order: LayerOrder, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self._order: LayerOrder = weakref.proxy(order)  # which refers to the layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._order.check_sliding_layer(self, key_states.shape[-2])
        keys, values = super().update(key_states.detach(), value_states.detach(), *args, **kwargs)
        return interface.tag(keys, self), values

    @settled
    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        """query `(H, n, D)`, the last n of the m tokens of keys and values `(K, m, D)` -> `(H, n, D)`."""
        groups, n, m = query.shape[0] // keys.shape[0], query.shape[1], keys.shape[1]
        position = torch.arange(m, device=keys.device)
        parts = []
        for first in range(0, n, ROWS):  # only the keys in their windows
            stop = min(first + ROWS, n)
            window = slice(max(0, m - n + first - self.sliding_window + 1), m - n + stop)
            distance = position[m - n + first : m - n + stop, None] - position[window]
            parts.append(
                torch.nn.functional.scaled_dot_product_attention(
                    query[None, :, first:stop],
                    keys[:, window].repeat_interleave(groups, 0).unsqueeze(0),
                    values[:, window].repeat_interleave(groups, 0).unsqueeze(0),
                    attn_mask=(distance >= 0) & (distance < self.sliding_window),
                    scale=scaling,
                )[0]
            )
        return torch.cat(parts, dim=1)

    def check_truncate(self, tokens: int) -> None:
        """Raise `OptionError` if the next token after the first `tokens` would attend to tokens that are gone."""
        length = self.get_seq_length()
        if tokens < length and length >= self.sliding_window:
            raise OptionError(
                f"a model with sliding windows cannot go back to {tokens} of {length} tokens: the tokens in the "
                "window at that point are gone. Start another cache."
            )

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens."""
        if tokens >= self.get_seq_length():
            return
        self.check_truncate(tokens)
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[:, :, :tokens], self.values[:, :, :tokens]
        self.cumulative_length = tokens

    def close(self) -> None:
        """Free the layer's memory."""
        self.keys = self.values = None
