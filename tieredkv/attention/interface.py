"""The attention function transformers calls, its mask function, and the switch that turns both on for one model.

A `TieredCache` returns from `update()` only the *new* keys, tagged with the layer that holds the rest; every model
family hands that very tensor on to the attention function, which lets the layer attend. Nothing is patched.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from tieredkv.ambient import attended_dtype, without_gradient
from tieredkv.errors import OptionError, UnsupportedModelError
from tieredkv.versions import cache_name
from tieredkv.wrapped import unwrapped

NAME = "tieredkv"
_TAG = "tieredkv_layer"


class AttendingLayer(Protocol):
    """What a tag must be able to do."""

    @property
    def sliding_window(self) -> int | None:
        """Tokens that a token sees, itself included; None: all."""

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attend from new tokens to all cached ones: query `(H, n, D)`, keys, values `(K, n, D)` -> `(H, n, D)`."""


def tag(keys: torch.Tensor, layer: AttendingLayer) -> torch.Tensor:
    """A view of `keys` that leads the attention function to `layer`."""
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
            f"a layer attends within a window of {sliding_window} tokens, where the config led to expect "
            f"{layer.sliding_window}: such a model is not supported."
        )
    if attention_mask is not None:
        raise OptionError("attention 'tieredkv' is causal and takes no prepared attention mask: pass none.")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast as torch's own attention is: all three in its dtype, and so the output.
    query, key, value = (part.to(attended_dtype(part)) for part in (query, key, value))
    out = without_gradient(layer.attend(query[0], key[0], value[0], scaling), query)
    return out.transpose(0, 1).unsqueeze(0).contiguous(), None


def tiered_mask(
    batch_size: int, attention_mask: torch.Tensor | None = None, use_vmap: bool = False, **kwargs: Any
) -> None:
    """The mask of a single unpadded causal sequence is none at all; anything else is refused, never ignored."""
    if batch_size != 1:
        raise OptionError(f"TieredCache holds one sequence, got a batch of {batch_size}: run them one at a time.")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise OptionError("TieredCache takes no padding: pass one sequence without padded tokens.")
    if use_vmap:
        raise UnsupportedModelError("the model overlays its causal mask (bidirectional images?), not supported.")


AttentionInterface.register(NAME, tiered_attention)
AttentionMaskInterface.register(NAME, tiered_mask)


_users: weakref.WeakKeyDictionary[PreTrainedModel, tuple[list[int], str]] = weakref.WeakKeyDictionary()
"""The threads of the `use_attention` blocks open on a model, and what to go back to after the last."""
_users_lock = threading.Lock()


def _switch(model: PreTrainedModel, name: str) -> None:
    text = model.config.get_text_config(decoder=True)
    sub_key = next((key for key in model.config.sub_configs if getattr(model.config, key, None) is text), None)
    model.set_attn_implementation(name if sub_key is None else {sub_key: name})


def _leave(model: PreTrainedModel, thread: int) -> None:
    """End one block of a thread's."""
    threads, before = _users[model]
    threads.remove(thread)
    if not threads:
        del _users[model]
        _switch(model, before)


def _after_fork() -> None:
    """The blocks of other threads do not go on in a forked process."""
    global _users_lock
    _users_lock = threading.Lock()
    for model, (threads, _) in list(_users.items()):
        for thread in [thread for thread in threads if thread != threading.get_ident()]:
            _leave(model, thread)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def use_attention(model: Any) -> Iterator[None]:
    """Let the model's decoder attend through `TieredCache` inside the block; what was set before comes back after.

    model: a transformers model, or a wrapper around one (`PeftModel`, torch.compile's). Blocks on one model may nest or
    overlap, from several threads too; the last to end restores. The vision tower keeps its own attention. Raises
    `UnsupportedModelError` when the model cannot be switched.
    """
    model = unwrapped(model)
    text, thread = model.config.get_text_config(decoder=True), threading.get_ident()
    with _users_lock:
        threads, _ = _users.setdefault(model, ([], text._attn_implementation))
        threads.append(thread)
        if len(threads) == 1:
            try:
                _switch(model, NAME)
                if text._attn_implementation != NAME:
                    raise UnsupportedModelError(
                        f"{type(model).__name__} ignores set_attn_implementation: its attention does not go through "
                        "transformers' AttentionInterface."
                    )
            except BaseException:
                del _users[model]
                raise
    try:
        yield
    finally:
        with _users_lock:
            _leave(model, thread)
