"""The engine with the bundled model: answers, refusals, and that nothing goes on that nobody waits for."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing

import pytest
from engine_examples import (
    OTHER,
    QUESTION,
    TIERS,
    Films,
    Running,
    all_of,
    answer_of,
    eventually,
    question,
    until,
)
from helpers import Gate

import tieredkv
from tieredkv.errors import OptionError, PromptError, VideoError
from tieredkv.serve.asked import Answer, Piece, Progress, Ready
from tieredkv.serve.errors import ApiError
from tieredkv.session.video_session import VideoSession

pytestmark = [pytest.mark.model, pytest.mark.threads]


@pytest.fixture(scope="session")
def plain(toy, short_video):
    """What the library answers."""
    with tieredkv.open_session(toy[0], short_video, processor=toy[1], fps=4, **TIERS) as session:
        return {prompt: session.ask(prompt, max_new_tokens=8) for prompt in (QUESTION, OTHER)}


@pytest.fixture
def films():
    return Films()


@pytest.fixture
async def running(toy, films):
    async with Running(*toy, films) as engine:
        yield engine


def gated(path, gate: Gate, **values):
    """A question whose answer waits at the gate at each step."""
    return question(path, options={"stopping_criteria": [gate], "max_new_tokens": 8, "min_new_tokens": 8}, **values)


# ---- answers


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
    last = [event for event in events if isinstance(event, Progress) and event.stage == "ingest"][-1]
    assert last.done == last.total > 200


async def test_a_second_question_about_a_film_ingests_nothing_whoever_asks(running, films, plain, short_video):
    await answer_of(running.ask(question(short_video, client="one")))
    answer = await answer_of(running.ask(question(short_video, OTHER, client="two")))
    assert answer.reused
    assert answer.generation.token_ids == plain[OTHER].token_ids
    assert len(films.ingested) == 1
    counts = running.snapshot().counts
    assert (counts.served, counts.ingested, counts.open_already) == (2, 1, 1)


async def test_another_part_of_a_film_is_another_session(running, films, short_video):
    first = await answer_of(running.ask(question(short_video)))
    part = await answer_of(running.ask(question(short_video, end=10)))
    assert not part.reused
    assert part.generation.stats.visual_tokens < first.generation.stats.visual_tokens
    assert len(films.ingested) == 2


async def test_tokens_joined_are_the_answer_and_each_has_its_moments(running, short_video):
    answer = await answer_of(running.ask(question(short_video, evidence="tokens")))
    assert len(answer.tokens) == len(answer.generation.token_ids) > 1
    assert "".join(token.text for token in answer.tokens) == answer.generation.text
    assert answer.tokens[0].moments[0].keys() >= {"start", "end", "weight"}


async def test_an_answer_that_was_cut_says_so(running, short_video):
    answer = await answer_of(running.ask(question(short_video, options={"max_new_tokens": 1})))
    assert answer.finish_reason == "length"
    assert answer.generation.stats.new_tokens == 1


async def test_preparing_makes_the_question_find_its_session(running, films, short_video):
    events = await all_of(running.prepare(question(short_video, "")))
    ready = events[-1]
    assert isinstance(ready, Ready)
    assert (ready.reused, ready.seconds) == (False, pytest.approx(30, abs=0.5))
    answer = await answer_of(running.ask(question(short_video)))
    assert answer.reused
    assert answer.generation.stats.visual_tokens < ready.tokens < answer.generation.stats.prompt_tokens
    assert (await all_of(running.prepare(question(short_video, ""))))[-1].reused
    assert len(films.ingested) == 1


async def test_observers_see_each_answer(running, short_video):
    seen = []
    running.observers.append(seen.append)
    answer = await answer_of(running.ask(question(short_video)))
    assert seen == [answer.generation]


# ---- what is wrong with a request is its own


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"prompt": " "}, PromptError),
        ({"options": {"temprature": 1}}, OptionError),
        ({"evidence": "words"}, OptionError),
        ({"system": ""}, PromptError),
    ],
)
async def test_what_can_be_refused_at_once_never_waits(running, short_video, values, error):
    with pytest.raises(error):
        await anext(running.ask(question(short_video, **values)))
    assert running.snapshot().waiting == 0


async def test_a_film_that_cannot_be_read_fails_its_own_request_only(running, tmp_path, short_video):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no film")
    failing = asyncio.create_task(all_of(running.ask(question(broken))))
    answer = await answer_of(running.ask(question(short_video)))
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        await failing
    assert answer.generation.text
    assert running.snapshot().counts.failed == 1


async def test_an_unexpected_error_is_logged_once_and_the_next_request_is_served(
    running, short_video, monkeypatch, caplog
):
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(VideoSession, "asking", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await all_of(running.ask(question(short_video)))
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]
    assert (await answer_of(running.ask(question(short_video)))).reused


async def test_a_film_that_changed_meanwhile_is_refused(running, short_video, tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(short_video.read_bytes())
    asked = question(path)
    with path.open("ab") as file:
        file.write(b"\0" * 8)
    with pytest.raises(VideoError, match="changed while it was read"):
        await all_of(running.ask(asked))
    assert running.snapshot().host.sessions == 0


# ---- the line


async def test_a_full_line_refuses_before_the_first_event(toy, short_video):
    async with Running(*toy, queue=1) as engine:
        gate = Gate()
        first = asyncio.create_task(answer_of(engine.ask(gated(short_video, gate))))
        await eventually(lambda: gate.steps)
        second = asyncio.create_task(answer_of(engine.ask(question(short_video, OTHER))))
        await eventually(lambda: engine.snapshot().waiting)
        with pytest.raises(ApiError, match="try again in") as refused:
            await anext(engine.ask(question(short_video)))
        assert (refused.value.status, refused.value.retry_after) == (429, 2)
        gate.open()
        await asyncio.gather(first, second)
        assert engine.snapshot().counts.refused == 1


async def test_clients_are_served_in_turn(running, short_video):
    gate, order = Gate(), []

    async def ask(client, name):
        await answer_of(running.ask(question(short_video, client=client)))
        order.append(name)

    first = asyncio.create_task(answer_of(running.ask(gated(short_video, gate))))
    await eventually(lambda: gate.steps)
    waiting = [asyncio.create_task(ask(name[0], name)) for name in ("a1", "a2", "a3", "b1")]
    await eventually(lambda: running.snapshot().waiting == 4)
    gate.open()
    await asyncio.gather(first, *waiting)
    assert order == ["a1", "b1", "a2", "a3"]


async def test_a_request_that_waits_is_told_its_place(running, short_video):
    gate = Gate()
    first = asyncio.create_task(answer_of(running.ask(gated(short_video, gate))))
    await eventually(lambda: gate.steps)
    async with (
        aclosing(running.ask(question(short_video))) as second,
        aclosing(running.ask(question(short_video))) as third,
    ):
        assert (await anext(second)).done == 1
        told = await anext(third)
        assert (told.stage, told.done) == ("queued", 2)
        await second.aclose()
        told = await anext(third)
        assert (told.stage, told.done) == ("queued", 1)
        assert told.seconds > 0
        gate.open()
    await first


async def test_a_reader_that_does_not_read_does_not_hold_up_the_others(running, short_video):
    async with aclosing(running.ask(question(short_video))) as slow:
        await anext(slow)
        assert (await answer_of(running.ask(question(short_video, OTHER)))).reused
        assert isinstance((await all_of(slow))[-1], Answer)


# ---- requests that go away


async def test_a_waiting_request_that_goes_away_leaves_at_once(running, short_video):
    gate = Gate()
    first = asyncio.create_task(answer_of(running.ask(gated(short_video, gate))))
    await eventually(lambda: gate.steps)
    waiting = asyncio.create_task(all_of(running.ask(question(short_video))))
    await eventually(lambda: running.snapshot().waiting == 1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert running.snapshot().waiting == 0
    gate.open()
    await first
    assert running.snapshot().counts.cancelled == 1


async def test_an_answer_that_nobody_reads_stops_at_its_next_step(running, plain, short_video):
    gate = Gate(free=2)
    async with aclosing(running.ask(gated(short_video, gate))) as events:
        await until(events, Piece)
        await eventually(lambda: gate.steps == 3)
    await asyncio.sleep(0.05)
    gate.open()
    await eventually(lambda: not running.snapshot().running)
    assert gate.steps == 3
    answer = await answer_of(running.ask(question(short_video, OTHER)))
    assert answer.generation.token_ids == plain[OTHER].token_ids


async def test_an_ingest_that_nobody_waits_for_stops(running, films, short_video):
    films.gate.clear()
    async with aclosing(running.ask(question(short_video))) as events:
        await until(events, Progress, "ingest")
    await eventually(lambda: not running.snapshot().running)
    assert running.snapshot().host.sessions == 0
    films.gate.set()
    assert not (await answer_of(running.ask(question(short_video)))).reused


async def test_two_requests_for_one_film_ingest_it_once_also_if_the_first_goes_away(running, films, short_video):
    films.gate.clear()
    first = running.ask(question(short_video))
    await until(first, Progress, "ingest")
    second = running.ask(question(short_video, OTHER))
    assert (await anext(second)).stage in ("queued", "ingest")
    await first.aclose()
    films.gate.set()
    events = await all_of(second)
    assert any(isinstance(event, Progress) and event.stage == "ingest" and event.done for event in events)
    assert events[-1].reused
    assert len(films.ingested) == 1


async def test_an_ingest_stops_once_the_last_of_two_that_wait_for_it_has_gone(running, films, short_video):
    films.gate.clear()
    first, second = running.ask(question(short_video)), running.ask(question(short_video, OTHER))
    await until(first, Progress, "ingest")
    await anext(second)
    await first.aclose()
    await asyncio.sleep(0.05)
    assert running.snapshot().running
    await second.aclose()
    await eventually(lambda: not running.snapshot().running)
    assert running.snapshot().host.sessions == 0


# ---- timeouts


async def timed_out(events) -> list:
    """The events before the timeout."""
    seen = []
    with pytest.raises(ApiError) as error:
        async for event in events:
            seen.append(event)
    assert (error.value.status, error.value.code) == (504, "timeout")
    return seen


async def test_a_request_past_its_timeout_ends_in_the_line_in_an_ingest_and_in_a_stream(toy, films, short_video):
    async with Running(*toy, films, timeout=0.7) as engine:
        films.gate.clear()
        seen, waited = await asyncio.gather(
            timed_out(engine.ask(question(short_video))),
            timed_out(engine.ask(question(short_video, end=10))),
        )
        assert seen[-1].stage == "ingest"
        assert waited[-1].stage == "queued"
        films.gate.set()
        await eventually(lambda: not engine.snapshot().running)
    async with Running(*toy, timeout=3) as engine:
        gate = Gate(free=2)
        seen = await timed_out(engine.ask(gated(short_video, gate)))
        assert isinstance(seen[-1], Piece)
        gate.open()
        assert (await answer_of(engine.ask(question(short_video)))).reused
        assert engine.snapshot().counts.timed_out == 1


# ---- the end


async def test_shutting_down_refuses_the_new_and_the_waiting_and_finishes_what_runs(toy, short_video):
    async with Running(*toy) as engine:
        gate = Gate()
        first = asyncio.create_task(answer_of(engine.ask(gated(short_video, gate))))
        await eventually(lambda: gate.steps)
        second = asyncio.create_task(all_of(engine.ask(question(short_video))))
        await eventually(lambda: engine.snapshot().waiting)
        stopping = asyncio.create_task(engine.stop(60))
        with pytest.raises(ApiError) as waiting:
            await second
        with pytest.raises(ApiError) as new:
            await anext(engine.ask(question(short_video)))
        assert [error.value.status for error in (waiting, new)] == [503, 503]
        gate.open()
        assert (await first).generation.stats.new_tokens == 8
        await stopping


async def test_what_runs_past_the_grace_is_stopped(toy, short_video):
    async with Running(*toy) as engine:
        gate = Gate(free=2)
        first = asyncio.create_task(all_of(engine.ask(gated(short_video, gate))))
        await eventually(lambda: gate.steps == 3)
        stopping = asyncio.create_task(engine.stop(0.1))
        with pytest.raises(ApiError) as error:
            await first
        assert error.value.status == 503
        await asyncio.sleep(0.05)
        gate.open()
        await stopping
        assert gate.steps == 3
        assert engine.snapshot().host.sessions == 0


async def test_an_ingest_past_the_grace_is_stopped(toy, films, short_video):
    async with Running(*toy, films) as engine:
        films.gate.clear()
        events = engine.ask(question(short_video))
        await until(events, Progress, "ingest")
        await engine.stop(0.1)
        with pytest.raises(ApiError):
            await all_of(events)
