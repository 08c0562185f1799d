"""The line of waiting requests: bounded, and one client cannot hold up the others."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tieredkv.serve.engine.line import LONGEST_WAIT_S, Line
from tieredkv.serve.errors import ApiError


async def served(line: Line[str]) -> list[str]:
    """All that wait, in the order in which they are taken."""
    order = []
    while len(line):
        order += await line.take()
    return order


def filled(*names: str) -> Line[str]:
    """A line of items called after their clients: "a1" is the client "a"'s."""
    line: Line[str] = Line(100)
    for name in names:
        line.join(name[0], name)
    return line


async def test_clients_are_served_in_turn_and_each_in_its_own_order():
    assert await served(filled("a1", "a2", "a3", "b1", "c1", "b2")) == ["a1", "b1", "c1", "a2", "b2", "a3"]


async def test_a_client_that_was_served_waits_for_the_others():
    line = filled("a1", "b1")
    assert await line.take() == ("a1",)
    line.join("a", "a2")
    assert await served(line) == ["b1", "a2"]


async def test_who_waits_for_an_item_gets_it():
    line: Line[str] = Line(1)
    taking = asyncio.create_task(line.take())
    await asyncio.sleep(0)
    line.join("a", "a1")
    assert await taking == ("a1",)
    assert len(line) == 0


async def test_an_item_that_left_is_never_taken_and_makes_room_at_once():
    line: Line[str] = Line(2)
    line.join("a", "a1")
    line.join("a", "a2")
    assert line.leave("a", "a1")
    assert not line.leave("a", "a1")
    line.join("b", "b1")
    assert await served(line) == ["a2", "b1"]
    assert not line.leave("a", "a2")


def test_one_more_than_may_wait_is_refused_with_a_time():
    line: Line[str] = Line(3)
    for seconds in (1.0, 4.0):
        line.served(seconds)
    for name in ("a1", "b1", "c1"):
        line.join(name[0], name)
    with pytest.raises(ApiError, match="3 requests are waiting") as refused:
        line.join("d", "d1")
    assert (refused.value.status, refused.value.code) == (429, "queue_full")
    assert refused.value.retry_after == 10  # the fourth, 2.5 s each
    assert len(line) == 3


@pytest.mark.parametrize(("seconds", "wait"), [(0.001, 1), (10_000.0, LONGEST_WAIT_S)])
def test_the_time_to_wait_has_limits(seconds, wait):
    line: Line[str] = Line(0)
    line.served(seconds)
    assert line.wait_s(1) == wait


def test_only_recent_durations_count():
    line: Line[str] = Line(0)
    line.served(10_000.0)
    for _ in range(30):
        line.served(2.0)
    assert line.wait_s(1) == 2


async def test_a_line_that_was_cleared_is_empty():
    line = filled("a1", "b1", "a2")
    assert sorted(line.clear()) == ["a1", "a2", "b1"]
    assert len(line) == 0


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.data())
def test_an_item_is_taken_after_as_many_as_are_ahead_of_it(clients, data):
    names = [f"{client}{number}" for number, client in enumerate(clients)]
    line = filled(*names)
    for name in data.draw(st.lists(st.sampled_from(names), unique=True, max_size=len(names) - 1)):
        line.leave(name[0], name)
        names.remove(name)
    ahead = {name: line.ahead(name[0], name) for name in names}
    order = asyncio.run(served(line))
    assert ahead == {name: place for place, name in enumerate(order)}
