"""Layers of linear attention: kept on the device, as transformers keeps them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from tieredkv.cache.layer_order import LayerOrder
from tieredkv.cache.untiered import State, host_copy
from tieredkv.environment.ambient import settled
from tieredkv.errors import OptionError


class LinearLayer(LinearAttentionLayer):
    """transformers' own layer, with one convolution state and one recurrent state.

    A call of the model counts once the layer passes its recurrent state, which it does last. A call that is interrupted
    before that changes nothing: the model only sees, and in steps of one token writes to, a copy of the convolution
    state, which the next call replaces.
    """

    kind = "linear attention"

    def __init__(self, order: LayerOrder) -> None:
        super().__init__()
        self._order: LayerOrder = weakref.proxy(order)  # which refers to the layer
        self._conv: torch.Tensor | None = None
        """The convolution state after `_length` tokens. The model has only a copy of it."""
        self._length = 0
        self._new = 1
        """Tokens of the present call. Steps of one token do not call `update_conv_state`, which counts more."""

    # ---- transformers' protocol

    @settled
    def begin(self) -> None:
        """Let the model see the states after the last whole call. It may read them more than once in a call."""
        self._new = 1
        if self._length == 0:
            self.has_previous_state[0] = False
        else:
            committed, _, seen = self._states()
            seen.copy_(committed)

    @settled
    def update_conv_state(self, conv_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._new = conv_states.shape[-1]
        return super().update_conv_state(conv_states, *args, **kwargs)

    @settled
    def update_recurrent_state(self, recurrent_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens, self._new = self._new, 1
        self._order.check_untiered_layer(self, tokens)
        recurrent = super().update_recurrent_state(recurrent_states, *args, **kwargs)
        seen = self.conv_states[0]
        assert seen is not None
        seen.detach_()  # from the graph of a call with gradients
        if self._conv is None:
            self._conv = seen.clone()
        self._conv.copy_(seen)
        self._length += tokens
        return recurrent

    def _states(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Convolution and recurrent state, and the convolution state that the model sees; once there are some."""
        conv, recurrent, seen = self._conv, self.recurrent_states[0], self.conv_states[0]
        assert conv is not None
        assert recurrent is not None
        assert seen is not None
        return conv, recurrent, seen

    def get_seq_length(self) -> int:
        """Tokens it has seen."""
        return self._length

    def activate_past_recording(self) -> None:
        raise OptionError("TieredCache does not support assisted decoding of models with linear attention.")

    # ---- going back, and the end

    @property
    def device_bytes(self) -> int:
        """Bytes allocated for the states."""
        held = (self._conv, self.conv_states[0], self.recurrent_states[0])
        return sum(state.nbytes for state in held if state is not None)

    def can_truncate(self, tokens: int) -> bool:
        """Whether the states are those after the first `tokens` tokens, or none."""
        return tokens == 0 or tokens >= self._length

    def truncate(self, tokens: int) -> None:
        """Forget all tokens, if `tokens` is 0. Others are refused before, where `can_truncate` says no."""
        if tokens == 0:
            self._length = 0

    def state(self) -> State:
        """Copies of both states in host memory."""
        conv, recurrent, _ = self._states()
        return {"conv": host_copy(conv), "recurrent": host_copy(recurrent)}

    def restore(self, state: State, tokens: int, device: torch.device | None = None) -> None:
        """Hold the states that were taken after `tokens` tokens."""
        if self._conv is None:
            self._conv = state["conv"].to(device, copy=True)
            self.lazy_initialization(self._conv, state["recurrent"].to(device))
            self.has_previous_state[0] = True
        conv, recurrent, _ = self._states()
        conv.copy_(state["conv"])
        recurrent.copy_(state["recurrent"])
        self._length, self._new = tokens, 1

    def close(self) -> None:
        """Free the layer's memory."""
        self._conv = self.conv_states[0] = self.recurrent_states[0] = None
        self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = False
        self._length = 0
