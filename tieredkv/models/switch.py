"""use_attention: a model's decoder attends through `TieredCache` inside a block."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from tieredkv.attention.interface import NAME
from tieredkv.environment import forking
from tieredkv.errors import UnsupportedModelError
from tieredkv.models.placement import check_readers
from tieredkv.models.sight import Watch
from tieredkv.models.wrapped import unwrapped

_users: weakref.WeakKeyDictionary[PreTrainedModel, tuple[list[int], str, Watch]] = weakref.WeakKeyDictionary()
"""For each model: the threads of its open `use_attention` blocks, and, after the last, the attention to restore and the
hooks to remove."""
_users_lock = threading.Lock()


def _switch(model: PreTrainedModel, name: str) -> None:
    text = model.config.get_text_config(decoder=True)
    sub_key = next((key for key in model.config.sub_configs if getattr(model.config, key, None) is text), None)
    model.set_attn_implementation(name if sub_key is None else {sub_key: name})


def _leave(model: PreTrainedModel, thread: int) -> None:
    """End one block of a thread."""
    threads, before, watch = _users[model]
    threads.remove(thread)
    if not threads:
        del _users[model]
        watch.end()
        _switch(model, before)


def _after_fork() -> None:
    """End the blocks of other threads, which do not exist in a forked process."""
    global _users_lock
    _users_lock = threading.Lock()
    for model, (threads, _, _) in list(_users.items()):
        for thread in [thread for thread in threads if thread != threading.get_ident()]:
            _leave(model, thread)


@contextmanager
def use_attention(model: Any) -> Iterator[None]:
    """Let the model's decoder attend through `TieredCache` inside the block, and restore its attention afterwards.

    model: a transformers model, or a wrapper around one (`PeftModel`, torch.compile's). Blocks on one model may nest or
    overlap, also in several threads; the last to end restores. The vision tower keeps its attention. Raises
    `UnsupportedModelError` if the model cannot be switched, or its layers are where they cannot attend.
    """
    model = unwrapped(model)
    check_readers(model)
    text, thread = model.config.get_text_config(decoder=True), threading.get_ident()
    with _users_lock:
        if model in _users:
            _users[model][0].append(thread)
        else:
            before, watch = text._attn_implementation, Watch(model)
            _users[model] = [thread], before, watch
            try:
                _switch(model, NAME)
                if text._attn_implementation != NAME:
                    raise UnsupportedModelError(
                        f"{type(model).__name__} ignores set_attn_implementation: its attention does not go through "
                        "transformers' AttentionInterface."
                    )
            except BaseException:
                del _users[model]
                watch.end()
                raise
    try:
        yield
    finally:
        with _users_lock:
            _leave(model, thread)


forking.in_child(_after_fork)
