"""An answer ends before its first stop text, in whatever pieces it comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi")

from tieredkv.serve.protocol.stops import Stops


def passed(stops: Stops, pieces: list[str]) -> list[str]:
    return [*(stops.feed(piece) for piece in pieces), stops.end()]


def test_without_stop_texts_every_piece_passes_at_once():
    assert passed(Stops(()), ["a", "b"]) == ["a", "b", ""]


def test_a_stop_text_over_two_pieces_is_never_shown():
    stops = Stops(["END"])
    assert passed(stops, ["abE", "ND", "c"]) == ["ab", "", "", ""]
    assert stops.found


def test_what_only_looked_like_a_stop_text_follows():
    assert passed(Stops(["END"]), ["abE", "Nx", "E"]) == ["ab", "ENx", "", "E"]


def test_the_text_that_is_complete_first_counts():
    assert Stops(["later", "now"]).cut("it is now or later") == "it is "
    assert Stops(["is now", "s"]).cut("it is now") == "it i"


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.data())
def test_pieces_of_any_size_give_the_same_answer_as_the_whole(answer, texts, data):
    at = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=4)))
    pieces = [answer[a:b] for a, b in zip([0, *at], [*at, len(answer)], strict=True)]
    stops = Stops(texts)
    assert "".join(passed(stops, pieces)) == stops.cut(answer)
    assert stops.found == (stops.cut(answer) != answer)


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=3))
def test_nothing_is_held_back_that_cannot_begin_a_stop_text(answer, stop):
    stops = Stops([stop])
    shown = "".join(stops.feed(letter) for letter in answer)
    if not stops.found:
        held = answer[len(shown) :]
        assert held == "" or (stop.startswith(held) and held != stop)
