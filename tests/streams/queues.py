"""Streams and events as queues: what CUDA promises about order, and nothing more.

Work is run when something waits for it, or before, as an `order` says. Stand-ins for `torch.cuda.Stream`, `Event` and
`CUDAGraph`; within a graph, work is in the order in which it was queued.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

Order = str | int
""""late": only when it has to. "copies first": all streams but the first at once, the first when it has to. "at once":
as on a CPU. A number: at random moments, the same ones for the same number."""


@dataclass
class Work:
    """What a stream is to do."""

    run: Callable[[], None]
    reads: list[torch.Tensor] = field(default_factory=list)
    writes: list[torch.Tensor] = field(default_factory=list)
    kernel: str = ""
    """What it does; of a kernel in brackets."""
    actor: Any = None
    clock: dict[Any, int] = field(default_factory=dict)
    """Which stream, and what it had seen when this was queued: for `races`."""


class Stream:
    """The fake of `torch.cuda.Stream`."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.priority = priority
        self.done, self.queue = 0, []
        """How much it has run, and what it is to run."""
        Queues.now.streams.append(self)

    @property
    def end(self) -> int:
        return self.done + len(self.queue)

    def wait_event(self, event: Event) -> None:
        Queues.now.wait(self, event)

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        Queues.now.synchronize(self)


class Event:
    """The fake of `torch.cuda.Event`."""

    def __init__(self, **kwargs: Any) -> None:
        self.stream: Stream | None = None
        self.place = 0
        self.clock: dict[Any, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or Queues.now.current
        self.place = self.stream.end
        Queues.now.recorded(self)


class Graph:
    """The fake of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.queued: list[Work] = []

    def replay(self) -> None:
        for work in self.queued:
            Queues.now.enqueue(Work(work.run, work.reads, work.writes, work.kernel))

    def reset(self) -> None:
        self.queued = []


class Queues:
    """All streams of a card."""

    now: Queues

    def __init__(self, order: Order = "late") -> None:
        self.order = order
        self._chance = random.Random(order) if isinstance(order, int) else None
        self.streams: list[Stream] = []
        Queues.now = self
        self.current = Stream()
        self.capturing: Graph | None = None
        self._running = 0
        self.waits = 0
        """How often the host has waited for a stream."""

    def enqueue(self, work: Work) -> None:
        """Queue work on the current stream."""
        if self.capturing is not None:
            self.capturing.queued.append(work)
            return
        stream = self.current
        stream.queue.append(work)
        if self._running:  # garbage was collected in the middle of other work, which nothing may overtake
            return
        if self.order == "at once" or (self.order == "copies first" and stream is not self.streams[0]):
            self.run(stream, stream.end)
        if self._chance is not None:
            for other in self.streams:
                if self._chance.random() < 0.3:
                    self.run(other, other.done + self._chance.randint(0, len(other.queue)))

    def run(self, stream: Stream, upto: int) -> None:
        """Run a stream's work up to its place `upto`."""
        while stream.done < upto:
            work = stream.queue.pop(0)
            stream.done += 1
            self._running += 1
            try:
                self.execute(work)
            finally:
                self._running -= 1

    def execute(self, work: Work) -> None:
        work.run()

    def wait(self, stream: Stream, event: Event) -> None:
        """Later work of a stream follows an event."""
        if event.stream is None or self.capturing is not None:
            return
        other, place = event.stream, event.place
        with self.stream(stream):
            self.enqueue(Work(lambda: self.run(other, place)))

    def recorded(self, event: Event) -> None:
        """Called when an event is recorded."""

    def synchronize(self, stream: Stream) -> None:
        """The host waits for a stream."""
        if self.capturing is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.waits += 1
        self.run(stream, stream.end)

    def synchronize_all(self, device: Any = None) -> None:
        for stream in self.streams:
            self.synchronize(stream)

    @contextmanager
    def stream(self, other: Stream | None) -> Iterator[None]:
        """The fake of `torch.cuda.stream`."""
        before, self.current = self.current, other or self.current
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, captured: Graph, stream: Stream, **kwargs: Any) -> Iterator[None]:
        """The fake of `torch.cuda.graph`."""
        self.synchronize_all()
        with self.stream(stream):
            self.capturing = captured
            try:
                yield
            finally:
                self.capturing = None

    def use(self, patch: Any) -> None:
        """Let `torch.cuda` be these queues."""
        fakes = {
            "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": self.graph, "stream": self.stream,
            "current_stream": lambda device=None: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "current_device": lambda: 0, "device": lambda device: nullcontext(), "synchronize": self.synchronize_all,
        }  # fmt: skip
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
