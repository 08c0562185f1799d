"""The decoding steps of one answer: eager on the CPU; on a card captured once in a CUDA graph and then replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.memory.capturing import capturing
from tieredkv.memory.ledger import on_device

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits `(1, vocabulary)` after a token `(1, 1)` at a position `(axes, 1)`; both are on the model's device."""


@dataclass
class _Captures:
    """What all captures on one card share, for as long as the process lives."""

    stream: torch.cuda.Stream
    """torch keeps cuBLAS's workspace of every stream, so a stream for each graph would cost 8 to 32 MiB each. Of high
    priority: those come from another pool than the streams of copies, with which it must not coincide."""
    failed: torch.cuda.CUDAGraph | None = None
    """A graph whose capture failed. It is kept alive, as older versions of torch go on asking it where to allocate. In
    these every later capture fails in `empty_cache`, so none is tried on this card."""
    why: str = ""


_captures: dict[torch.device, _Captures] = {}


def _captures_on(card: torch.device) -> _Captures:
    if card not in _captures:
        _captures[card] = _Captures(torch.cuda.Stream(card, priority=-1))
    return _captures[card]


class StepGraph:
    """Takes tokens one by one, each at the next position.

    On a card the first step runs eagerly, which also compiles kernels; the second is captured. From then on a step is
    one launch: token and position are written where the graph reads them, and none of the model's Python code runs.
    Counters that the cache keeps in Python are advanced here.
    """

    def __init__(self, forward: Forward, cache: TieredCache, device: torch.device, axes: int, position: int) -> None:
        """position: of the first token. axes: of positions; generated tokens have the same position on all of them."""
        assert cache.decoding is not None
        self._forward, self._cache, self._decoding = forward, cache, cache.decoding
        self._token = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self._place = torch.zeros((axes, 1), dtype=torch.int64, device=device)
        self._position, self._taken = position, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0, dtype=torch.float32, device=device)
        self.path = "eager"
        """How the last step ran: "eager", "graph", or "eager: " and why there is no graph."""
        if device.type == "cuda" and cache.question.trace:
            self.path = "eager: the chunks attended to are recorded"
        elif len(cache.device_tier.devices) > 1:
            self.path = "eager: the model is spread over several devices"
        elif cache.untiered.layers:
            self.path = "eager: the model has layers that do not grow"
        elif any(layer.readers for layer in cache.tiered_layers):  # a reader's step begins with counts kept in Python
            self.path = "eager: the model has layers that read another layer's keys"
        elif device.type == "cuda" and not self._decoding.ops.capturable:
            self.path = f"eager: operations by {self._decoding.ops.name}"

    def __call__(self, token: int) -> torch.Tensor:
        """Cache the token; logits `(1, vocabulary)` after it, valid until the next step."""
        self._token.fill_(token)
        self._place.fill_(self._position)
        self._position += 1
        self._taken += 1
        if self._graph is None and self._taken == 2 and self._token.device.type == "cuda" and self.path == "eager":
            self._capture()
        if self._graph is None:
            logits = self._forward(self._token, self._place)
        else:
            self._decoding.advance()
            self._graph.replay()
            logits = self._logits
        self._decoding.record_step()
        return logits

    def _capture(self) -> None:
        cache, device = self._cache, self._token.device
        cache.device_tier.copies.drain()
        position, before = self._decoding.position(), torch.cuda.current_stream(device)
        with capturing(), on_device(device):
            shared = _captures_on(device)
            if shared.failed is not None:
                self.path = f"eager: an earlier capture failed ({shared.why})"
                return
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=shared.stream, capture_error_mode="thread_local"):
                    self._logits = self._forward(self._token, self._place)
                    cache.finish()  # copies for the next step become part of the graph
            except RuntimeError as error:
                shared.failed, shared.why = graph, str(error).strip().splitlines()[0]
                graph.reset()  # torch 2.14 ends allocation for the graph here
                self.path = f"eager: {shared.why}"
                torch.cuda.set_stream(before)  # torch leaves the failed capture's stream current
                cache.device_tier.copies.drain()
            else:
                self._graph, self.path = graph, "graph"
            finally:
                self._decoding.go_back(position)  # capturing a step does not run it
