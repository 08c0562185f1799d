"""The engine with the bundled model: answers, refusals, and that nothing goes on that nobody waits for."""

from __future__ import annotations

import pytest
from engine_examples import OTHER, QUESTION, TIERS, Running, all_of, answer_of, question

import tieredkv
from tieredkv.models.loading import load
from tieredkv.serve.asked import Answer, Piece, Progress
from tieredkv.tiny.model import PATH

pytestmark = [pytest.mark.model, pytest.mark.threads]


@pytest.fixture(scope="session")
def toy():
    """The bundled model and its processor."""
    return load(str(PATH), None)


@pytest.fixture(scope="session")
def plain(toy, short_video):
    """What the library answers."""
    with tieredkv.open_session(toy[0], short_video, processor=toy[1], fps=4, **TIERS) as session:
        return {prompt: session.ask(prompt, max_new_tokens=8) for prompt in (QUESTION, OTHER)}


@pytest.fixture
async def running(toy):
    async with Running(*toy) as engine:
        yield engine


async def test_an_answer_is_that_of_the_library(running, plain, short_video):
    answer = await answer_of(running.ask(question(short_video)))
    assert answer.generation.token_ids == plain[QUESTION].token_ids
    assert [moment.as_dict() for moment in answer.generation.evidence] == [
        moment.as_dict() for moment in plain[QUESTION].evidence
    ]
    assert (answer.finish_reason, answer.reused, answer.tokens) == ("stop", False, None)


async def test_what_happens_is_told_in_order(running, short_video):
    events = await all_of(running.ask(question(short_video)))
    stages = [event.stage for event in events if isinstance(event, Progress)]
    assert list(dict.fromkeys(stages)) == ["queued", "ingest", "question"]
    assert [type(event) for event in events[-2:]] == [Piece, Answer]
