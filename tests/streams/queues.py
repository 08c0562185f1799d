"""Streams and events as queues: what CUDA promises about order, and nothing more.

Work is run when something waits for it, or before, as an `order` says. Stand-ins for `torch.cuda.Stream`, `Event` and
`CUDAGraph`. A capture keeps the order of each stream that takes part and what its events say; a replay promises no more
than that, whatever streams it was captured from. What CUDA refuses during a capture raises RuntimeError here.
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
        self.graph: Graph | None = None
        """In whose capture it was recorded."""
        self.clock: dict[Any, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or Queues.now.current
        self.graph, self.place = Queues.now.graph_of(self.stream), self.stream.end
        if self.graph is not None:
            self.graph.add(self.stream, Recorded(self))
        else:
            Queues.now.recorded(self)


@dataclass(frozen=True)
class Recorded:
    """An event is recorded on a stream."""

    event: Event


@dataclass(frozen=True)
class Awaited:
    """A stream waits for an event."""

    event: Event


class Graph:
    """The fake of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        """That take part, the one it is captured on first."""
        self._queued: list[tuple[Stream, Work | Recorded | Awaited]] = []
        self._branches: list[Stream] = []
        """What a replay uses instead of all but the first."""

    def add(self, stream: Stream, what: Work | Recorded | Awaited) -> None:
        """Take part in the capture, on a stream."""
        self._queued.append((stream, what))

    @property
    def unjoined(self) -> bool:
        """Whether the first stream's end comes before that of another."""
        seen: dict[Stream, dict[Stream, int]] = {stream: {stream: 0} for stream in self.streams}
        recorded: dict[int, dict[Stream, int]] = {}
        for stream, what in self._queued:
            own = seen[stream]
            if isinstance(what, Recorded):
                recorded[id(what.event)] = dict(own)
                continue
            own[stream] += 1
            if isinstance(what, Awaited):
                for other, place in recorded[id(what.event)].items():
                    own[other] = max(own.get(other, 0), place)
        first = seen[self.streams[0]]
        return any(first.get(stream, 0) < seen[stream][stream] for stream in self.streams)

    def replay(self) -> None:
        """Every branch begins with a wait for another and ends joined, or the capture was refused."""
        queues = Queues.now
        while len(self._branches) < len(self.streams) - 1:
            self._branches.append(Stream())
        played = dict(zip(self.streams, [queues.current, *self._branches], strict=True))
        events: dict[int, Event] = {}
        for stream, what in self._queued:
            with queues.stream(played[stream]):
                if isinstance(what, Recorded):
                    events[id(what.event)] = event = Event()
                    event.record()
                elif isinstance(what, Awaited):
                    queues.wait(queues.current, events[id(what.event)])
                else:
                    queues.enqueue(Work(what.run, what.reads, what.writes, what.kernel))

    def reset(self) -> None:
        self._queued = []


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
        """Queue work on the current stream, or note it for a graph if that is captured."""
        if (graph := self.graph_of(self.current)) is not None:
            graph.add(self.current, work)
        else:
            self.queue(work)

    def queue(self, work: Work) -> None:
        """Queue work on the current stream."""
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
        """Later work of a stream follows an event. A stream that waits for one of a capture takes part in that."""
        if event.stream is None:
            return
        if event.graph is not None:
            if event.graph is not self.capturing:
                raise RuntimeError(
                    "CUDA error: operation not permitted on an event last recorded in a capturing stream"
                )
            if stream not in event.graph.streams:
                event.graph.streams.append(stream)
            event.graph.add(stream, Awaited(event))
            return
        if self.graph_of(stream) is not None:
            raise RuntimeError("CUDA error: dependency created on uncaptured work in another stream")
        other, place = event.stream, event.place
        with self.stream(stream):
            self.enqueue(Work(lambda: self.run(other, place)))

    def recorded(self, event: Event) -> None:
        """Called when an event is recorded that is in no graph."""

    def graph_of(self, stream: Stream) -> Graph | None:
        """The graph under way, if a stream takes part in its capture."""
        graph = self.capturing
        return graph if graph is not None and stream in graph.streams else None

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
        """The fake of `torch.cuda.graph`. After a capture that failed its stream is still the current one."""
        self.synchronize_all()
        before, self.current = self.current, stream
        self.capturing, captured.streams = captured, [stream]
        try:
            yield
        finally:
            self.capturing = None
            self.captured()
        if captured.unjoined:
            raise RuntimeError("CUDA error: capturing stream has unjoined work")
        self.current = before

    def captured(self) -> None:
        """Called at the end of a capture, however it ended."""

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
