"""use_attention: one model's decoder attends through `TieredCache` inside a block, and as before after it."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from tieredkv.attention.interface import NAME
from tieredkv.errors import UnsupportedModelError
from tieredkv.models.wrapped import unwrapped

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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
