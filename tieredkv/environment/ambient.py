"""What the calling thread has set in torch: what our own arithmetic runs under, and what another thread gets of it.

A model runs under whatever its caller has set: autocast, inference mode, a default device. Our own arithmetic does
not: keys and values outlive the mode that they came in, and are of the dtype they were made in. (torch's default dtype
and device, which `settled` leaves alone, are named wherever a tensor is made: a test looks.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
_KINDS = ("cpu", "cuda")
"""Of devices, which autocast is set for one by one."""


def settled(function: F) -> F:
    """A function that runs without gradients, autocast and inference mode, whatever its caller has set.

    So what it makes can be written to later, in any mode and from any thread.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        cast = [kind for kind in _KINDS if torch.is_autocast_enabled(kind)]
        inference = torch.is_inference_mode_enabled()
        if not (cast or inference or torch.is_grad_enabled()):
            return function(*args, **kwargs)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False) if inference else nullcontext())
            stack.enter_context(torch.no_grad())
            for kind in cast:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def attended_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which torch's own attention would take a query, key or value: under autocast, that one's."""
    kind = tensor.device.type
    if kind in _KINDS and torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


class Ambient:
    """What the calling thread has set, for another thread to run a model under. (No thread begins with its maker's.)"""

    def __init__(self, device: bool = False) -> None:
        """device: the default device too, which whoever is called back may count on."""
        self._cast = [(kind, torch.get_autocast_dtype(kind)) for kind in _KINDS if torch.is_autocast_enabled(kind)]
        self._cache = torch.is_autocast_cache_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._device = torch.get_default_device() if device else torch.device("cpu")
        # The current card and its stream, on which what was given to the card comes before what follows.
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    @contextmanager
    def here(self) -> Any:
        """Inside the block this thread has set the same."""
        with ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            if self._device.type != "cpu":
                stack.enter_context(self._device)
            if self._inference:
                stack.enter_context(torch.inference_mode())
            for kind, dtype in self._cast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self._cache))
            yield


class _NoWayBack(torch.autograd.Function):
    """Hands on what attention gave, of which no gradient can be had."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("a TieredCache keeps no gradients: train without it, and call it under torch.no_grad().")


def without_gradient(out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """What was computed of `query` without gradients; asking for one raises, where it would be silently wrong."""
    if torch.is_grad_enabled() and query.requires_grad:
        return _NoWayBack.apply(out, query)  # type: ignore[no-any-return,no-untyped-call]
    return out
