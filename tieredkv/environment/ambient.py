"""torch's per-thread settings: switched off for our own arithmetic, passed on to other threads that run a model.

A model runs under whatever its caller has set: autocast, inference mode, a default device. Our own arithmetic does
not, as keys and values outlive such modes and keep their dtype. (`settled` leaves torch's default dtype and device
alone: every tensor that the package creates names both, which a test checks.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
_KINDS = ("cpu", "cuda")
"""Device types; autocast is set for each separately."""


def settled(function: F) -> F:
    """Makes a function run without gradients, autocast and inference mode, whatever its caller has set.

    Tensors that it creates can then be written to later, in any mode and from any thread.
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
    """The dtype that torch's own attention would compute in: autocast's where that is on, else the tensor's."""
    kind = tensor.device.type
    if kind in _KINDS and torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


class Ambient:
    """The calling thread's settings, for another thread to run a model under: threads do not inherit them."""

    def __init__(self, device: bool = False, stream: bool = True) -> None:
        """device: include the default device, which a user's callback may rely on. stream: include the current stream
        of the current card; False: others have one of their own, and weights that autocast converts there are not
        kept for the model, which would not wait for them."""
        self._cast = [(kind, torch.get_autocast_dtype(kind)) for kind in _KINDS if torch.is_autocast_enabled(kind)]
        self._cache = stream and torch.is_autocast_cache_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._device = torch.get_default_device() if device else torch.device("cpu")
        # The current card and its stream: later work on it follows the work already queued there.
        self._stream = torch.cuda.current_stream() if stream and torch.cuda.is_initialized() else None

    @contextmanager
    def here(self) -> Any:
        """Apply the settings to this thread inside the block."""
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


class _NoGradient(torch.autograd.Function):
    """Returns the output of attention; raises when its gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("a TieredCache keeps no gradients: train without it, and call it under torch.no_grad().")


def without_gradient(out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """`out`, computed from `query` without gradients. Asking for one raises; otherwise it would be silently wrong."""
    if torch.is_grad_enabled() and query.requires_grad:
        return _NoGradient.apply(out, query)  # type: ignore[no-any-return,no-untyped-call]
    return out
