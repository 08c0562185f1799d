"""What the streams of a card do at the same time, computed from a trace of its kernels.

Times are microseconds. Which stream a trace shows for a node of a CUDA graph is up to the driver, so that two branches
may be shown on one; `copies_hidden` does not depend on it.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

STEPS = 4
"""Steps in a trace."""
ON_A_CARD = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a Chrome trace."""
COPY = re.compile(r"_(gather|fetch)\b|Memcpy (HtoD|DtoH)")
"""How the names of what crosses the link begin: kernels of `ops.triton`, and the driver's copies."""

Spans = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel or a copy that ran on a card."""

    name: str
    stream: int
    start: float
    end: float

    @property
    def copies(self) -> bool:
        """Between host and card."""
        return COPY.match(self.name) is not None


def union(kernels: Iterable[Kernel]) -> Spans:
    """When any of the kernels runs: spans in order, none of which touch."""
    spans: Spans = []
    for start, end in sorted((kernel.start, kernel.end) for kernel in kernels):
        if spans and start <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], end)
        else:
            spans.append((start, end))
    return spans


def length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


def common(one: Spans, other: Spans) -> float:
    """How long both run. Both as `union` returns them."""
    total, i, j = 0.0, 0, 0
    while i < len(one) and j < len(other):
        total += max(0.0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return total


def overlap(kernels: Sequence[Kernel], steps: int = 1) -> dict[str, Any]:
    """What runs at the same time, each time divided by `steps`. The main stream is the one that computes longest.

    launches: of each stream, by its number. aside_us: all that runs on other streams; aside_hidden: the share of it
    during which the main stream computes, that is, runs something that is not a copy. aside_copies_us,
    aside_copies_hidden: the same of copies only. copies_us, copies_hidden: of copies on any stream, and the share
    during which something else than a copy runs on any. Shares are None if there is nothing to share.
    """
    computing: dict[int, float] = defaultdict(float)
    for kernel in kernels:
        computing[kernel.stream] += 0.0 if kernel.copies else kernel.end - kernel.start
    main = max(computing, key=lambda stream: computing[stream], default=None)
    others = [kernel for kernel in kernels if kernel.stream != main]
    computed = union(kernel for kernel in kernels if not kernel.copies)
    on_main = union(kernel for kernel in kernels if kernel.stream == main and not kernel.copies)

    def told(name: str, spans: Spans, beside: Spans) -> dict[str, float | None]:
        took = length(spans)
        return {f"{name}_us": took / steps, f"{name}_hidden": common(spans, beside) / took if took else None}

    launches = Counter(kernel.stream for kernel in kernels)
    return {
        "main_stream": main,
        "launches": {str(stream): count / steps for stream, count in sorted(launches.items())},
        **told("aside", union(others), on_main),
        **told("aside_copies", union(kernel for kernel in others if kernel.copies), on_main),
        **told("copies", union(kernel for kernel in kernels if kernel.copies), computed),
    }


def kernels_in(trace: Path) -> list[Kernel]:
    """The kernels and copies of a Chrome trace that torch has written, which may be compressed (".gz")."""
    written = trace.read_bytes()
    events = json.loads(gzip.decompress(written) if trace.suffix == ".gz" else written)["traceEvents"]
    return [
        Kernel(event["name"], int(event["args"]["stream"]), event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("ph") == "X" and event.get("cat") in ON_A_CARD
    ]


def record(step: Callable[[], object], trace: Path) -> dict[str, Any]:
    """Take some steps on a card and write their Chrome trace, compressed if it is called ".gz". Returns `overlap` for
    a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    profiled.export_chrome_trace(str(trace))
    return overlap(kernels_in(trace), STEPS)


def traced(sealed: Callable[[bool], AbstractContextManager[Any]], trace: Path) -> dict[str, Any]:
    """A trace of steps as they are usually taken; of eager ones where that shows one stream only. sealed: gives a
    `StepGraph`, by whether it is to run eagerly. Some steps are taken first: they compile, and capture the graph.
    Returns `overlap`, and how the steps ran (`path`)."""
    told: dict[str, Any] = {}
    for eager in (False, True):
        with sealed(eager) as steps:
            for _ in range(STEPS):
                steps(7)
            told = record(lambda: steps(7), trace) | {"path": steps.path}
        if len(told["launches"]) > 1:
            break
    return told
