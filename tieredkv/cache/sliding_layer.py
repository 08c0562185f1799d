"""Layers that see only the last tokens: kept whole on the device, as transformers keeps them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from tieredkv.attention import interface
from tieredkv.cache.layer_order import LayerOrder
from tieredkv.cache.untiered import State, host_copy
from tieredkv.environment.ambient import settled

ROWS = 1024
"""Queries that attend at a time."""


class SlidingLayer(DynamicSlidingWindowLayer):
    """transformers' own layer, attending through our attention function because the whole decoder does.

    It holds at most `sliding_window` tokens, whatever the length of the prompt. They do not count against `gpu_kv_gb`.
    """

    kind = "sliding windows"

    def __init__(self, order: LayerOrder, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self._order: LayerOrder = weakref.proxy(order)  # which refers to the layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._order.check_untiered_layer(self, key_states.shape[-2])
        keys, values = super().update(key_states.detach(), value_states.detach(), *args, **kwargs)
        return interface.tag(keys, self), values

    @settled
    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        ahead: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query `(H, n, D)`, the last n of the m tokens of keys and values `(K, m, D)` -> `(H, n, D)`.

        ahead: `(n,)`, how many later tokens each one sees; None: none.
        """
        groups, n, m = query.shape[0] // keys.shape[0], query.shape[1], keys.shape[1]
        position = torch.arange(m, device=keys.device)
        parts = []
        for first in range(0, n, ROWS):  # only the keys in their windows
            stop = min(first + ROWS, n)
            last = m - n + stop if ahead is None else m
            window = slice(max(0, m - n + first - self.sliding_window + 1), last)
            distance = position[m - n + first : m - n + stop, None] - position[window]
            nearest = 0 if ahead is None else -ahead[first:stop, None]
            parts.append(
                torch.nn.functional.scaled_dot_product_attention(
                    query[None, :, first:stop],
                    keys[:, window].repeat_interleave(groups, 0).unsqueeze(0),
                    values[:, window].repeat_interleave(groups, 0).unsqueeze(0),
                    attn_mask=(distance >= nearest) & (distance < self.sliding_window),
                    scale=scaling,
                )[0]
            )
        return torch.cat(parts, dim=1)

    @property
    def device_bytes(self) -> int:
        """Bytes allocated for keys and values: after a call of many tokens more than the window's, until the next."""
        return sum(part.untyped_storage().nbytes() for part in (self.keys, self.values) if part is not None)

    def can_truncate(self, tokens: int) -> bool:
        """Whether the token after the first `tokens` would find all that lies within its window."""
        length = self.get_seq_length()
        return tokens == 0 or tokens >= length or length < self.sliding_window

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens. Only where `can_truncate`."""
        if tokens >= self.get_seq_length():
            return
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[:, :, :tokens], self.values[:, :, :tokens]
        self.cumulative_length = tokens

    def state(self) -> State:
        """Copies of the window's keys and values in host memory."""
        assert self.keys is not None
        assert self.values is not None
        return {"keys": host_copy(self.keys), "values": host_copy(self.values)}

    def restore(self, state: State, tokens: int, device: torch.device | None = None) -> None:
        """Hold the window that was taken after `tokens` tokens. On a CPU it shares memory with `state`: updates make
        new tensors."""
        keys, values = (state[name].to(device or self.device) for name in ("keys", "values"))
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys, self.values, self.cumulative_length = keys, values, tokens

    def close(self) -> None:
        """Free the layer's memory."""
        self.keys = self.values = None
