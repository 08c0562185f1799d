"""Graphs on the simulated card: a replay keeps the order that was captured and no more; what CUDA refuses raises."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from queues import Event, Graph, Order, Queues, Stream, Work
from races import RaceCheck
from simulated_card import CARD, simulated_card

ORDERS: tuple[Order, ...] = ("late", "copies first", "at once", *range(8))


class Steps:
    """Work that says when it is run, by name."""

    def __init__(self, order: Order) -> None:
        self.queues, self.done = Queues(order), []
        self.captured, self.side = Stream(), Stream()

    def work(self, name: str, stream: Stream | None = None) -> None:
        with self.queues.stream(stream or self.queues.current):
            self.queues.enqueue(Work(lambda: self.done.append(name)))

    def graph(self, body) -> Graph:
        graph = Graph()
        with self.queues.graph(graph, self.captured):
            body()
        return graph

    def forked(self) -> None:
        """One branch beside another."""
        self.work("fork")
        self.side.wait_stream(self.captured)
        self.work("side", self.side)
        self.work("main")
        self.captured.wait_stream(self.side)
        self.work("join")


@pytest.mark.parametrize("order", ORDERS)
def test_a_replay_keeps_the_order_that_was_captured(order):
    steps = Steps(order)
    graph = steps.graph(steps.forked)
    assert steps.done == []
    for _ in range(3):
        steps.work("before")
        graph.replay()
        steps.work("after")
    steps.queues.synchronize(steps.queues.current)
    for replay in range(3):
        before, fork, *both, join, after = steps.done[6 * replay : 6 * replay + 6]
        assert (before, fork, join, after) == ("before", "fork", "join", "after")
        assert sorted(both) == ["main", "side"]


def test_branches_run_in_either_order():
    found = set()
    for order in ORDERS:
        steps = Steps(order)
        graph = steps.graph(steps.forked)
        graph.replay()
        steps.queues.synchronize(steps.queues.current)
        found.add(tuple(steps.done))
    assert found == {("fork", "main", "side", "join"), ("fork", "side", "main", "join")}


def test_a_branch_is_apart_from_the_stream_that_it_was_captured_on():
    """What is queued there between replays does not hold it up."""
    steps = Steps("late")
    graph = steps.graph(steps.forked)
    steps.work("elsewhere", steps.side)
    graph.replay()
    steps.queues.synchronize(steps.queues.current)
    assert "elsewhere" not in steps.done


@pytest.mark.parametrize("place", ["begin", "middle"])
def test_a_fork_that_is_not_joined_is_refused(place):
    steps = Steps("late")

    def body() -> None:
        steps.forked()
        steps.side.wait_stream(steps.captured)
        if place == "middle":
            steps.work("side", steps.side)
            steps.captured.wait_stream(steps.side)
            steps.work("too late", steps.side)

    with pytest.raises(RuntimeError, match="unjoined work"):
        steps.graph(body)
    assert steps.queues.current is steps.captured, "as torch leaves it"
    assert steps.queues.capturing is None


def test_a_fork_joined_by_way_of_another_is_joined():
    steps, third = Steps("late"), Stream()

    def body() -> None:
        steps.side.wait_stream(steps.captured)
        third.wait_stream(steps.side)
        steps.work("third", third)
        steps.side.wait_stream(third)
        steps.captured.wait_stream(steps.side)

    steps.graph(body).replay()
    steps.queues.synchronize(steps.queues.current)
    assert steps.done == ["third"]


def test_events_do_not_cross_the_border_of_a_capture():
    steps, before, within = Steps("late"), Event(), Event()
    before.record(steps.side)
    with pytest.raises(RuntimeError, match="uncaptured work"):
        steps.graph(lambda: steps.captured.wait_event(before))
    steps = Steps("late")
    steps.graph(lambda: within.record(steps.captured))
    with pytest.raises(RuntimeError, match="last recorded in a capturing stream"):
        steps.side.wait_event(within)


def test_a_stream_that_takes_no_part_is_not_captured():
    steps = Steps("at once")
    steps.graph(lambda: steps.work("apart", steps.side))
    assert steps.done == ["apart"]


def captured(body):
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        body(stream)
    return graph


def test_memory_freed_in_a_capture_is_anybodys_from_there_on_in_each_replay(monkeypatch):
    with simulated_card(monkeypatch):
        kept, x, apart = torch.zeros(4, device=CARD), torch.ones(4, device=CARD), torch.cuda.Stream()
        made = []

        def body(stream):
            freed = x + 1
            apart.wait_stream(stream)
            with torch.cuda.stream(apart):
                kept.copy_(freed)
            del freed
            stream.wait_stream(apart)
            made.append(x + 2)

        graph = captured(body)
        for _ in range(2):
            graph.replay()
            assert kept.cpu().isnan().all()
            assert made[0].tolist() == [3] * 4
        del made[0]
        graph.replay()
        torch.cuda.synchronize()


def test_memory_of_no_graph_is_not_freed_by_one(monkeypatch):
    with simulated_card(monkeypatch) as card:
        stream, kept = torch.cuda.Stream(), torch.zeros(4, device=CARD)
        with torch.cuda.stream(stream):
            held = [torch.ones(4, device=CARD)]
        torch.cuda.synchronize()
        memory, graph = held[0].memory, torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept.add_(1)
            held.clear()
        assert not memory.isnan().any()
        card.synchronize(stream)
        assert memory.isnan().all(), "from the capture's end on"
        memory.zero_()
        graph.replay()
        assert kept.tolist() == [1] * 4
        assert not memory.isnan().any()


@pytest.mark.parametrize("ordered", [True, False])
def test_a_wait_that_is_missing_within_a_graph_alone_is_found(monkeypatch, ordered):
    with simulated_card(monkeypatch, kind=RaceCheck) as card:
        x, side = torch.zeros(8, device=CARD), torch.cuda.Stream()

        def body(stream):
            side.wait_stream(stream)
            with torch.cuda.stream(side):
                x.add_(1)
            if ordered:
                stream.wait_stream(side)
            x.mul_(2)
            stream.wait_stream(side)

        graph = captured(body)
        assert card.races == []
        x.add_(1)
        graph.replay()
        x.add_(1)
        graph.replay()
        x.add_(1)
        assert bool(card.races) != ordered
        assert all("mul_" in race and "add_" in race for race in card.races)


def test_a_replay_is_in_no_order_with_other_streams(monkeypatch):
    with simulated_card(monkeypatch, kind=RaceCheck) as card:
        x, apart = torch.zeros(8, device=CARD), torch.cuda.Stream()
        graph = captured(lambda stream: x.add_(1))
        apart.wait_stream(torch.cuda.current_stream())
        graph.replay()
        with torch.cuda.stream(apart):
            x.sum()
        assert len(card.races) == 1
