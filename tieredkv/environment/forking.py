"""Forked processes: a child has a copy of its parent's memory, but only the thread that forked.

The other threads, and the locks they held, are lost: locks are created anew, background threads are restarted when they
are needed, and objects that another thread was working on are refused. torch's OpenMP threads, once used, are lost too:
an operation on several of them waits for ever, in stock transformers as well. In the child, the thread that forked
therefore computes on one thread; threads started there get OpenMP threads of their own. A card that the parent has used
cannot be used by a child.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

import torch

from tieredkv.environment.threads import limit
from tieredkv.errors import TieredKVError


class Follower(Protocol):
    """An object to repair in a child."""

    def after_fork(self) -> None:
        """Called in a child, on its only thread."""


_used: set[str] = set()
"""Device types that this package has computed on in this process."""
_lost: set[str] = set()
"""Device types that the package had computed on in the parent process or an ancestor."""
_forking_thread: int | None = None
"""The thread of a child that existed at the fork; None in a process that was not forked."""
_followers: weakref.WeakSet[Follower] = weakref.WeakSet()


def enter(device: str) -> None:
    """Called before computing on a device of this type. Raises `TieredKVError` if this process cannot."""
    check()
    if device != "cpu" and device in _lost:
        raise TieredKVError(
            "this process was forked from one that used the card, and cannot use it: start it with the 'spawn' method."
        )
    _used.update(("cpu", device))


def check() -> None:
    """In a child, set torch to one thread, so that no operation waits for threads that were lost.

    Raises `TieredKVError` where that cannot be set, as the parent may have used torch's threads.
    """
    if threading.get_ident() == _forking_thread and torch.get_num_threads() > 1 and not limit(1):
        raise TieredKVError(
            "this process was forked without torch's threads: call torch.set_num_threads(1) first, or start "
            "it with the 'spawn' method."
        )


def follow(owner: Follower) -> None:
    """Call `owner.after_fork()` in every child, as long as `owner` lives."""
    _followers.add(owner)


def in_child(action: Callable[[], None]) -> None:
    """Call `action` in every child."""
    if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
        os.register_at_fork(after_in_child=action)


def _in_child() -> None:
    global _forking_thread
    _forking_thread = threading.get_ident()
    _lost.update(_used)
    _used.clear()
    for owner in list(_followers):
        owner.after_fork()


in_child(_in_child)
