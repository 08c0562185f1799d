"""A happens-before check: two accesses to the same bytes, one of them a write, that nothing puts in order.

Runs on a simulated card that does everything at once, and keeps a vector clock for the host and for each stream.
Queueing work orders it after what the host has seen, an event after the work before it, a wait later work after the
event, and a host that waits has seen all of a stream. What an operation reads and writes follows from its arguments, to
the byte where they are views; of operations that pick rows by an index, and of kernels, from the rows and addresses
themselves. Allocating and freeing count as writes by the stream that allocates. A replayed graph is checked as what it
queues, each of its branches a stream of its own. Not checked: the order of kernels' programs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from queues import Event, Order, Stream, Work
from simulated_card import Card, arguments_written
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpreterBuilder

MOST_RUNS = 4096
"""Runs of bytes to tell apart in a view; of more, all between the first and the last byte count."""
HOST = "host"


@dataclass
class Access:
    """Bytes that somebody touched, and when."""

    actor: Any
    time: int
    runs: np.ndarray
    """`(runs, 2)`: begins and ends, ascending."""
    writes: bool
    what: str


class RaceCheck(Card):
    """A card that collects `races`, as sentences."""

    def __init__(self, order: Order = "at once") -> None:
        super().__init__("at once")
        self.races: list[str] = []
        self._clocks: dict[Any, dict[Any, int]] = {}
        self._seen: dict[int, list[Access]] = {}
        """By storage."""
        self._alive: list[torch.Tensor] = []
        """All memory that was touched, so that no other takes its addresses."""
        self._known: dict[int, tuple[int, int]] = {}
        self._touched: list[tuple[np.ndarray, bool]] | None = None
        """What the kernel under way has touched: addresses `(n, 2)`, and whether it wrote."""

    # ---- clocks

    def _clock(self, actor: Any) -> dict[Any, int]:
        return self._clocks.setdefault(actor, {actor: 0})

    def _follow(self, actor: Any, other: dict[Any, int]) -> None:
        own = self._clock(actor)
        for each, time in other.items():
            own[each] = max(own.get(each, 0), time)

    def _tick(self, actor: Any) -> dict[Any, int]:
        own = self._clock(actor)
        own[actor] += 1
        return dict(own)

    def queue(self, work: Work) -> None:
        stream = self.current
        self._follow(stream, self._clock(HOST))
        work.clock, work.actor = self._tick(stream), stream
        super().queue(work)

    def recorded(self, event: Event) -> None:
        self._follow(event.stream, self._clock(HOST))
        event.clock = dict(self._clock(event.stream))

    def wait(self, stream: Stream, event: Event) -> None:
        self._follow(stream, event.clock)  # of one that is captured, its replay's
        super().wait(stream, event)

    def synchronize(self, stream: Stream) -> None:
        super().synchronize(stream)
        self._follow(HOST, self._clock(stream))

    # ---- accesses

    def execute(self, work: Work) -> None:
        if work.kernel.startswith("["):
            for tensor in work.reads:
                self.know(tensor)
            self._touched = []
            super().execute(work)
            touched, self._touched = self._touched, None
            for writes in (False, True):
                self._addresses([runs for runs, wrote in touched if wrote == writes], work, writes)
            return
        picked = work.kernel.removeprefix("aten.").split(".")[0]
        for writes, tensors in ((False, work.reads), (True, work.writes)):
            for tensor in tensors:
                rows = rows_of(picked, work, tensor)
                runs = runs_of(tensor) if rows is None else rows
                self._note(tensor, runs, work.actor, work.clock, writes, work.kernel)
        super().execute(work)

    def on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.is_view or not (tensors := [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]):
            return super().on_host(func, args, kwargs)
        written, clock = arguments_written(func, args, kwargs), self._tick(HOST)
        for tensor in tensors:
            writes = any(tensor is each for each in written)
            self._note(tensor, runs_of(tensor), HOST, clock, writes, f"{func} on the host")
        return super().on_host(func, args, kwargs)

    def _addresses(self, touched: list[np.ndarray], work: Work, writes: bool) -> None:
        if not touched:
            return
        runs = np.unique(np.concatenate(touched), axis=0)
        bases = np.array(sorted(self._known))
        owners = bases[np.searchsorted(bases, runs[:, 0], side="right") - 1]
        for base in np.unique(owners):
            key, end = self._known[int(base)]
            mine = runs[(owners == base) & (runs[:, 0] < end)]
            self._check(key, Access(work.actor, work.clock[work.actor], mine, writes, work.kernel), work.clock)

    def know(self, tensor: torch.Tensor) -> int:
        """Remember a tensor's storage. Returns its key."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key and key not in self._known:
            self._alive.append(tensor)
            self._known[key] = key, key + storage.nbytes()
        return key

    def _note(
        self, tensor: torch.Tensor, runs: np.ndarray, actor: Any, clock: dict[Any, int], writes: bool, what: str
    ) -> None:
        if tensor.numel():
            self._check(self.know(tensor), Access(actor, clock[actor], runs, writes, what), clock)

    def _check(self, key: int, new: Access, clock: dict[Any, int]) -> None:
        kept = []
        for old in self._seen.get(key, []):
            ordered = old.actor == new.actor or clock.get(old.actor, 0) >= old.time
            if not ordered and (old.writes or new.writes) and overlap(old.runs, new.runs):
                self.races.append(f"{new.what} {said(new)} what {old.what} {said(old)}, and nothing puts them in order")
            same = old.runs.shape == new.runs.shape and bool((old.runs == new.runs).all())
            if not (ordered and same and (new.writes or not old.writes)):
                kept.append(old)
        self._seen[key] = [*kept, new]

    # ---- kernels

    def watch(self, patch: Any) -> None:
        """Follow the addresses that kernels touch."""
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def noting_load(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self._touch(ptrs, mask, False)
            return load(builder, ptrs, mask, *rest)

        def noting_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._touch(ptrs, mask, True)
            return store(builder, ptrs, value, mask, *rest)

        patch.setattr(InterpreterBuilder, "create_masked_load", noting_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", noting_store)

    def _touch(self, ptrs: Any, mask: Any, writes: bool) -> None:
        if self._touched is not None:
            begins = ptrs.data[mask.data.astype(bool)].astype(np.int64).reshape(-1)
            size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
            self._touched.append((merged(np.unique(begins), size), writes))


def lasting(run: Callable[[], list[str]]) -> list[str]:
    """The races that a run finds, as `run` returns them, and a second run too.

    What happens and in which order is the same in every run; addresses are not. On a busy machine single runs have
    reported races that no other run did, of accesses that cannot be of the same memory; why is not known.
    """
    if not (found := run()):
        return []
    again = set(run())
    return [race for race in found if race in again]


def said(access: Access) -> str:
    return "writes" if access.writes else "reads"


def merged(begins: np.ndarray, size: int) -> np.ndarray:
    """Runs of pieces of `size` bytes that begin at ascending addresses."""
    if not len(begins):
        return np.empty((0, 2), dtype=np.int64)
    first = np.flatnonzero(np.diff(begins, prepend=begins[0] - size - 1) > size)
    last = np.append(first[1:] - 1, len(begins) - 1)
    return np.stack((begins[first], begins[last] + size), axis=1)


def overlap(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two ascending lists of runs have a byte in common."""
    if not len(a) or not len(b):
        return False
    place = np.searchsorted(a[:, 0], b[:, 1], side="left") - 1  # the last of a that begins before each of b ends
    return bool(((place >= 0) & (a[np.maximum(place, 0), 1] > b[:, 0])).any())


def runs_of(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a view."""
    size, begin = tensor.itemsize, tensor.data_ptr()
    dims = sorted(
        (stride, length) for stride, length in zip(tensor.stride(), tensor.shape, strict=True) if stride and length > 1
    )
    whole = 1
    while dims and dims[0][0] <= whole:  # those that follow without a gap
        stride, length = dims.pop(0)
        whole = max(whole, stride * (length - 1) + whole)
    if np.prod([length for _, length in dims], dtype=float) > MOST_RUNS:
        return np.array([[begin, begin + (sum(s * (n - 1) for s, n in dims) + whole) * size]], dtype=np.int64)
    offsets = np.zeros(1, dtype=np.int64)
    for stride, length in dims:
        offsets = (offsets[:, None] + stride * np.arange(length)).reshape(-1)
    begins = np.sort(begin + offsets * size)
    return np.stack((begins, begins + whole * size), axis=1)


def rows_of(picked: str, work: Work, tensor: torch.Tensor) -> np.ndarray | None:
    """Of a tensor that an operation reads or writes rows of by one index of its first axis: those; None: all of it."""
    index = [each for each in work.reads if each.dtype in (torch.int32, torch.int64) and each.dim() == 1]
    first = work.writes[0] if picked.startswith("index_put") else work.reads[0] if work.reads else None
    rows = picked in ("index", "index_select", "index_put_") and len(index) == 1 and tensor is first
    if not rows or tensor.dim() < 2 or not tensor[0].is_contiguous():
        return None
    width = tensor.stride(0) * tensor.itemsize
    begins = np.unique(tensor.data_ptr() + index[0].numpy().astype(np.int64) * width)
    return np.stack((begins, begins + tensor[0].numel() * tensor.itemsize), axis=1)
