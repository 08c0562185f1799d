"""Layers that convolve the last few tokens: their state is kept on the device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from tieredkv.cache.layer_order import LayerOrder
from tieredkv.cache.untiered import State, host_copy
from tieredkv.environment.ambient import settled
from tieredkv.errors import OptionError, UnsupportedModelError


class ConvLayer(LinearAttentionLayer):
    """A layer whose only state is the input of its convolution at the last tokens, as many as the kernel is wide.

    Nothing writes to a state: each call of the model makes another, so that a call counts entirely or not at all.
    """

    kind = "convolutions"
    is_croppable = False

    def __init__(self, order: LayerOrder) -> None:
        super().__init__()
        self._order: LayerOrder = weakref.proxy(order)  # which refers to the layer
        self._length = 0
        # Models then pass single tokens to `update_conv_state` too, instead of writing to the state.
        self.record_past = True

    # ---- transformers' protocol

    @settled
    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Inputs of the convolution `(1, channels, n)` at n new tokens, after those of the last tokens."""
        if conv_kernel_size is None:
            raise UnsupportedModelError("a convolution that does not state the width of its kernel is not supported.")
        tokens = conv_states.shape[-1]
        self._order.check_untiered_layer(self, tokens)
        past = self.conv_states[0] if self._length else None
        if past is None:
            past = conv_states.new_zeros((*conv_states.shape[:-1], conv_kernel_size))
        inputs = torch.cat((past, conv_states.detach()), dim=-1)
        self._set(inputs[..., -conv_kernel_size:].clone(), self._length + tokens)
        return inputs

    def update_recurrent_state(self, recurrent_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise UnsupportedModelError("a convolution layer with a recurrent state is not supported.")

    def _set(self, state: torch.Tensor | None, length: int) -> None:
        self.has_previous_state[0] = length > 0
        self.is_conv_states_initialized[0] = state is not None
        # Last and together: an interrupt cannot come between.
        self.conv_states[0], self._length = state, length

    def get_seq_length(self) -> int:
        """Tokens it has seen."""
        return self._length

    def activate_past_recording(self) -> None:
        raise OptionError("TieredCache does not support assisted decoding of models with convolutions.")

    # ---- going back, and the end

    @property
    def device_bytes(self) -> int:
        """Bytes allocated for the state."""
        state = self.conv_states[0]
        return 0 if state is None else state.nbytes

    def can_truncate(self, tokens: int) -> bool:
        """Whether the state is that after the first `tokens` tokens, or none."""
        return tokens == 0 or tokens >= self._length

    def truncate(self, tokens: int) -> None:
        """Forget all tokens, if `tokens` is 0. Others are refused before, where `can_truncate` says no."""
        if tokens == 0:
            self._set(self.conv_states[0], 0)

    def state(self) -> State:
        """A copy of the state in host memory."""
        state = self.conv_states[0]
        assert state is not None
        return {"conv": host_copy(state)}

    def restore(self, state: State, tokens: int, device: torch.device | None = None) -> None:
        """Hold the state that was taken after `tokens` tokens. On a CPU it shares memory with `state`."""
        held = self.conv_states[0]
        if device is None and held is not None:
            device = held.device
        self._set(state["conv"].to(device), tokens)

    def close(self) -> None:
        """Free the layer's memory."""
        self._set(None, 0)
