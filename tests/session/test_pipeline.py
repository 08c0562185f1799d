"""Stages on threads: bounded, quick to fail and to stop, and never left running."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from helpers import PATIENCE_S

from tieredkv.session import pipeline as pipelines
from tieredkv.session.pipeline import Cancelled, Pipeline


class WatchedPipeline(Pipeline):
    """Records which threads wait, by name; threads of no stage are "outside"."""

    def __init__(self) -> None:
        super().__init__()
        lock = threading.RLock()
        self.changed, self.arrivals = threading.Condition(lock), threading.Condition(lock)
        self.waiting: set[str] = set()

    def wait(self) -> None:
        name = stage.name if (stage := self._stage_here()) else "outside"
        self.waiting.add(name)
        self.arrivals.notify_all()
        super().wait()
        self.waiting.discard(name)

    def wait_for(self, *names: str) -> None:
        """Block until all of these wait. Under `changed`, they then wait until it is released."""
        with self.arrivals:
            assert self.arrivals.wait_for(lambda: self.waiting >= set(names), PATIENCE_S), "it hangs"


def stage_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("tieredkv-") and "prefetch" not in t.name]


def test_items_come_in_order_through_all_stages():
    with Pipeline() as pipeline:
        numbers = pipeline.stage("numbers", iter(range(20)))
        squares = pipeline.stage("squares", (n * n for n in numbers), depth=3)
        assert list(squares) == [n * n for n in range(20)]


@pytest.mark.parametrize("depth", [1, 3])
def test_a_stage_runs_no_further_ahead_than_its_queue(depth):
    yielded = []

    def numbers():
        for n in range(100):
            yielded.append(n)
            yield n

    with WatchedPipeline() as pipeline:
        items = pipeline.stage("numbers", numbers(), depth)
        next(items)
        pipeline.wait_for("numbers")
        assert len(yielded) <= 1 + depth + 1  # taken, queued, and one in hand
        assert list(items) == list(range(1, 100))


def test_an_error_is_raised_where_the_items_are_taken_ahead_of_queued_ones():
    def failing():
        yield 1
        yield 2
        raise ValueError("broken")

    with Pipeline() as pipeline:
        items = pipeline.stage("failing", failing(), depth=5)
        items.thread.join()
        with pytest.raises(ValueError, match="broken"):
            next(items)
    assert stage_threads() == []


def test_an_error_in_the_first_stage_comes_through_the_second():
    def failing():
        yield 1
        raise OSError("the disk is gone")

    with Pipeline() as pipeline, pytest.raises(OSError, match="the disk is gone"):
        list(pipeline.stage("second", (n for n in pipeline.stage("first", failing()))))
    assert stage_threads() == []


def test_leaving_the_block_ends_every_thread_whatever_it_waits_for():
    def endless():
        while True:
            yield 0

    with pytest.raises(KeyError), Pipeline() as pipeline:
        next(pipeline.stage("second", (n for n in pipeline.stage("first", endless()))))
        raise KeyError
    assert stage_threads() == []


def test_a_generator_is_closed_when_its_stage_is_stopped():
    closed = threading.Event()

    def holding():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    with Pipeline() as pipeline:
        next(pipeline.stage("holding", holding()))
    assert closed.is_set()


def test_cancelling_from_another_thread_wakes_whoever_waits():
    release = threading.Event()

    def stuck():
        release.wait(PATIENCE_S)
        yield 1

    def cancel():
        pipeline.wait_for("outside")
        pipeline.cancel()

    with WatchedPipeline() as pipeline:
        items = pipeline.stage("stuck", stuck())
        canceller = threading.Thread(target=cancel)
        canceller.start()
        with pytest.raises(Cancelled):
            next(items)
        assert not release.is_set()
        with pytest.raises(Cancelled):
            pipeline.check()
        release.set()
    canceller.join()
    assert stage_threads() == []


def test_an_error_in_a_stage_that_nobody_reads_is_noticed():
    def failing():
        raise OSError("the file is gone")
        yield

    def endless():
        while True:
            yield 0

    with Pipeline() as pipeline:
        numbers = pipeline.stage("numbers", endless())
        pipeline.stage("aside", failing())
        with pytest.raises(OSError, match="the file is gone"):
            for _ in numbers:
                pass


def test_a_handled_error_keeps_nothing_alive():
    import gc
    import weakref

    class Large:
        pass

    def failing(large):
        yield 1
        raise ValueError("broken")

    def work():
        large = Large()
        with Pipeline() as pipeline, pytest.raises(ValueError, match="broken"):
            list(pipeline.stage("failing", failing(large)))
        return weakref.ref(large)

    gc.disable()
    try:
        assert work()() is None
    finally:
        gc.enable()


def test_a_stage_that_cannot_be_closed_is_an_error_not_a_hang():
    class Stubborn:
        def __iter__(self):
            return self

        def __next__(self):
            raise StopIteration

        def close(self):
            raise OSError("will not close")

    with Pipeline() as pipeline, pytest.raises(OSError, match="will not close"):
        list(pipeline.stage("stubborn", Stubborn()))


def test_a_thread_that_cannot_start_is_the_error_raised(monkeypatch):
    with pytest.raises(RuntimeError, match="no more threads"), Pipeline() as pipeline:
        first = pipeline.stage("first", iter(range(3)))

        def refuse(self):
            raise RuntimeError("no more threads")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        pipeline.stage("second", first)
    assert stage_threads() == []


def test_waiting_does_not_count_as_work(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(pipelines, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def slow():
        for n in range(4):
            with pipeline.changed:
                pipeline.wait_for("quick", "outside")
                clock[0] += 1
            yield n

    with WatchedPipeline() as pipeline:
        slowly = pipeline.stage("slow", slow())
        quickly = pipeline.stage("quick", (n for n in slowly))
        assert list(quickly) == [0, 1, 2, 3]
        busy = pipeline.busy_seconds()
    assert pipeline.waited == 4
    assert {name: busy[name] for name in ("slow", "quick")} == {"slow": 4, "quick": 0}
