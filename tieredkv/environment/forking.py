"""Forked processes: a child has its parent's memory, and of its threads only the one that forked.

Threads, and what they hold or were about to do, are lost: locks are made anew, background threads begin again when they
are needed, and what another thread was at work on is refused. torch's own threads (OpenMP's), once used, do not survive
a fork either: an operation on several of them waits for ever, in stock transformers too. So the thread that forked
computes on one thread in the child; threads that begin there have OpenMP threads of their own. A card that the parent
has used cannot be used by a child.
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
    """What puts itself in order in a child."""

    def after_fork(self) -> None:
        """Called in a child, on the only thread there is."""


_used: set[str] = set()
"""Kinds of device on which this process has computed for us."""
_lost: set[str] = set()
"""Those on which a process had that this one was forked from."""
_forked: int | None = None
"""The thread of a child that there was at the fork; None in a process that was not forked."""
_followers: weakref.WeakSet[Follower] = weakref.WeakSet()


def enter(device: str) -> None:
    """Called before anything is computed on a device of this kind. Raises `TieredKVError` where that cannot be here."""
    check()
    if device != "cpu" and device in _lost:
        raise TieredKVError(
            "this process was forked from one that used the card, and cannot use it: start it with the 'spawn' method."
        )
    _used.update(("cpu", device))


def check() -> None:
    """Keep torch's operations from waiting for threads that are not in this process: they run on one thread.

    Raises `TieredKVError` where that cannot be set. Whether the parent has used torch's threads is not known.
    """
    if threading.get_ident() == _forked and torch.get_num_threads() > 1 and not limit(1):
        raise TieredKVError(
            "this process was forked, and torch's threads are not in it: call torch.set_num_threads(1) first, or start "
            "it with the 'spawn' method."
        )


def follow(owner: Follower) -> None:
    """Have `owner.after_fork()` called in every child, as long as it lives."""
    _followers.add(owner)


def in_child(action: Callable[[], None]) -> None:
    """Have `action` called in every child."""
    if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
        os.register_at_fork(after_in_child=action)


def _in_child() -> None:
    global _forked
    _forked = threading.get_ident()
    _lost.update(_used)
    _used.clear()
    for owner in list(_followers):
        owner.after_fork()


in_child(_in_child)
