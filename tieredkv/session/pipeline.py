"""Stages of one job, each on its own thread and connected to the next by a bounded queue.

    with Pipeline() as pipeline:
        segments = pipeline.stage("decode", decode(file), depth=1)
        features = pipeline.stage("encode", map(encode, segments), depth=1)
        for part in features:
            ...

A stage is an iterator; its queue holds at most `depth` items. An error in any stage stops all stages. It is raised
outside them, at the next `check` or item taken, ahead of items still queued. Leaving the block, by an error or not,
stops and joins every thread. `cancel` may be called from any thread: waiting and `check` then raise `Cancelled`.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from tieredkv.environment.ambient import Ambient
from tieredkv.errors import TieredKVError

T = TypeVar("T")


class Cancelled(Exception):
    """The job was cancelled; raised in every stage at its next item."""


class _Stage(Generic[T]):
    """One stage's thread and queue. Every wait is on the pipeline's condition."""

    def __init__(self, pipeline: Pipeline, name: str, items: Iterator[T], depth: int) -> None:
        self.pipeline, self.name, self.items, self.depth = pipeline, name, items, depth
        self.queue: deque[T] = deque()
        self.ended = False
        self._started: float | None = None
        self._lifetime = self.waited = 0.0
        """Seconds: the thread's lifetime, and its waits for room or for another stage's items."""
        self._ambient = Ambient()
        self.thread = threading.Thread(target=self._run, name=f"tieredkv-{name}", daemon=True)

    def _run(self) -> None:
        self._started = started = time.perf_counter()
        try:
            try:
                with self._ambient.here():
                    for item in self.items:
                        self._put(item)
            finally:
                self._lifetime, self._started = time.perf_counter() - started, None
                if (close := getattr(self.items, "close", None)) is not None:
                    close()
        except Cancelled:
            pass
        except BaseException as error:  # noqa: BLE001  raised again outside the stages
            self.pipeline.fail(error)
        finally:
            with self.pipeline.changed:
                self.ended = True
                self.pipeline.changed.notify_all()

    @property
    def busy(self) -> float:
        """Seconds it has worked, without its waits that have ended."""
        started = self._started
        lifetime = self._lifetime if started is None else time.perf_counter() - started
        return lifetime - self.waited

    def _put(self, item: T) -> None:
        with self.pipeline.changed:
            while len(self.queue) >= self.depth and not self.pipeline.cancelled:
                self.pipeline.wait()
            self.pipeline.check()
            self.queue.append(item)
            self.pipeline.changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self.pipeline.changed:
            while not (self.queue or self.ended or self.pipeline.cancelled):
                self.pipeline.wait()
            self.pipeline.check()
            if not self.queue:
                raise StopIteration
            item = self.queue.popleft()
            self.pipeline.changed.notify_all()
            return item


class Pipeline:
    """Stages that run at once, usually each taking the items of the previous one."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._process = os.getpid()
        self.cancelled = False
        self.waited = 0.0
        """Seconds for which threads outside the stages have waited for items."""
        self._error: BaseException | None = None
        self._stages: list[_Stage] = []

    def stage(self, name: str, items: Iterator[T], depth: int = 1) -> Iterator[T]:
        """Run `items` ahead on a thread; the iterator returned yields the same items."""
        stage = _Stage(self, name, items, depth)
        self._stages.append(stage)
        try:
            stage.thread.start()
        except BaseException:
            self._stages.remove(stage)  # nothing to join
            raise
        return stage

    def check(self) -> None:
        """Raise what a stage raised, once and outside the stages, or `Cancelled` if the job was cancelled."""
        if self._error is not None and self._stage_here() is None:
            error, self._error = self._error, None  # its traceback keeps the stages' data alive
            try:
                raise error
            finally:
                del error
        if self.cancelled:
            raise Cancelled

    def cancel(self) -> None:
        """Stop every stage at its next item, without waiting. May be called twice."""
        if self._process != os.getpid():  # forked: the stages are not here, and `changed` may be locked forever
            self.cancelled = True
            return
        with self.changed:
            self.cancelled = True
            self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Cancel because of an error in a stage; later errors are dropped."""
        with self.changed:
            if not self.cancelled:
                self._error = error
            self.cancel()

    def wait(self) -> None:
        """Wait for a change, with `changed` locked; the time is added to `waited` of the current thread's stage."""
        if self._process != os.getpid():
            raise TieredKVError("the process was forked while a video was being ingested: open it again here.")
        started = time.perf_counter()
        self.changed.wait()
        waiter: Pipeline | _Stage = self._stage_here() or self
        waiter.waited += time.perf_counter() - started

    def _stage_here(self) -> _Stage | None:
        """The stage of the current thread."""
        here = threading.current_thread()
        return next((stage for stage in self._stages if stage.thread is here), None)

    def busy_seconds(self) -> dict[str, float]:
        """Seconds each stage has worked so far, without its waits. Final once the stages have ended."""
        return {stage.name: stage.busy for stage in self._stages}

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()
        for stage in self._stages:
            stage.thread.join()
        self._stages.clear()
        self._error = None
