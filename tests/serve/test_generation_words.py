"""OpenAI's and vLLM's words for generation, as transformers' options."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from tieredkv.serve.errors import ApiError
from tieredkv.serve.protocol.generation import GenerationFields
from tieredkv.serve.settings import Settings
from tieredkv.session.generation import check_options

GREEDY = {"do_sample": False}


def options(most: int | None = None, **fields):
    found = GenerationFields(**fields).options(Settings(max_new_tokens=100), most)
    check_options(found)
    return found


def chosen(**fields):
    return {name: value for name, value in options(**fields).items() if name != "max_new_tokens"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"temperature": 0}, GREEDY),
        ({"temperature": 0, "top_p": 0.5, "top_k": 3}, GREEDY),
        ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7}),
        ({"temperature": 1, "top_p": 1, "top_k": -1}, {"do_sample": True, "temperature": 1, "top_p": 1, "top_k": 0}),
        ({"top_p": 0.9}, {"do_sample": True, "top_p": 0.9}),
        ({"top_p": 1}, {}),
        ({"min_p": 0.1}, {"do_sample": True, "min_p": 0.1}),
        ({"seed": 7}, {"seed": 7}),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"stop": "END"}, {"stop_strings": ["END"]}),
        ({"stop": ["a", "b"]}, {"stop_strings": ["a", "b"]}),
        ({"stop": []}, {}),
        ({"ignore_eos": True}, {"min_new_tokens": 100}),
        ({"min_tokens": 5}, {"min_new_tokens": 5}),
    ],
    ids=str,
)
def test_words_become_options_that_sessions_accept(fields, expected):
    assert chosen(**fields) == expected


def test_the_length_is_the_requests_or_the_servers():
    assert options()["max_new_tokens"] == 100
    assert options(most=7)["max_new_tokens"] == 7
    assert options(most=7, min_tokens=9)["min_new_tokens"] == 7


@pytest.mark.parametrize("stop", ["", [""], ["a"] * 5, "x" * 2000])
def test_stop_texts_are_limited(stop):
    with pytest.raises(ApiError, match=r"^stop has"):
        options(stop=stop)


@pytest.mark.parametrize("penalty", [0, 1e-30, 1e30])
def test_a_penalty_by_which_scores_would_overflow_is_refused(penalty):
    with pytest.raises(ValueError, match="repetition_penalty"):
        options(repetition_penalty=penalty, temperature=1)
