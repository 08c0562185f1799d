"""asyncio: the event loop stays free while a video is ingested and asked about, and cancelling stops the work."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PATIENCE_S, Gate, ended, pressed, tier_options
from transformers import AsyncTextIteratorStreamer

import tieredkv
from tieredkv.errors import BudgetError, OptionError, PromptError, TieredKVError, VideoError
from tieredkv.models.families import video_family
from tieredkv.session import ingest
from tieredkv.session.video_session import VideoSession

pytestmark = pytest.mark.threads
STAR, MOON = "what colour was the star ?", "follow the moon for 4 ?"
TIGHT = tier_options(chunk_tokens=8, recent_window=16, theta=0.4)


@pytest.fixture
def session(video_model, processor, frames):
    options = {**TIGHT, **pressed(video_model, 280, 0.6), "processor": processor, "fps": 4}
    with tieredkv.open_session(video_model, frames, **options) as opened:
        yield opened


@pytest.fixture
def opening(video_model, processor):
    """Options under which the tests' frames are ingested in many chunks."""
    return {
        **pressed(video_model, 500, 0.6),
        "processor": processor,
        "fps": 4,
        "prefill_chunk": 16,
        **TIGHT,
    }


@pytest.fixture
def caches(monkeypatch):
    """Every cache that a session creates."""
    created, make = [], ingest.TieredCache

    def recorded(*args, **options):
        created.append(make(*args, **options))
        return created[-1]

    monkeypatch.setattr(ingest, "TieredCache", recorded)
    return created


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tieredkv")]


async def reached(gate: Gate, step: int) -> None:
    """Wait, without blocking the loop, until the answer is at that step."""
    await asyncio.to_thread(gate.wait_for_step, step)


@pytest.mark.parametrize("way", ["ask", "chat"])
async def test_an_awaited_answer_is_that_of_the_plain_call(session, way):
    plain = getattr(session, way)(MOON, max_new_tokens=6)
    session.clear_history()
    awaited = await getattr(session, f"a{way}")(MOON, max_new_tokens=6)
    assert awaited.token_ids == plain.token_ids
    assert session.history == (((MOON, plain.text),) if way == "chat" else ())


@pytest.mark.parametrize("way", ["aask", "achat"])
async def test_an_asynchronous_stream_gives_the_text_in_pieces(session, way):
    stream = getattr(session, way)(MOON, max_new_tokens=6, stream=True)
    with pytest.raises(TieredKVError, match="read the stream to its end first"):
        stream.generation  # noqa: B018
    pieces = [piece async for piece in stream]
    assert "".join(pieces) == stream.generation.text
    assert len(pieces) > 3
    assert [piece async for piece in stream] == []


@pytest.mark.parametrize("stream", [False, True])
async def test_agenerate_is_generate(video_model, frames, opening, caches, stream):
    plain = tieredkv.generate(video_model, frames, MOON, max_new_tokens=5, **opening)
    if stream:
        pieces = tieredkv.agenerate(video_model, frames, MOON, max_new_tokens=5, stream=True, **opening)
        assert "".join([piece async for piece in pieces]) == plain.text
        answer = pieces.generation
    else:
        answer = await tieredkv.agenerate(video_model, frames, MOON, max_new_tokens=5, **opening)
    assert answer.token_ids == plain.token_ids
    assert our_threads() == []
    assert [cache.ledger.used_bytes + cache.host_bytes for cache in caches] == [0, 0]


async def test_several_videos_are_ingested_and_asked_about_at_once(video_model, frames, opening):
    videos = [frames, frames[::-1]]
    alone = [tieredkv.generate(video_model, video, MOON, max_new_tokens=5, **opening).token_ids for video in videos]
    together = await asyncio.gather(
        *(tieredkv.agenerate(video_model, video, MOON, max_new_tokens=5, **opening) for video in videos)
    )
    assert [answer.token_ids for answer in together] == alone


@pytest.mark.parametrize("stream", [False, True])
async def test_early_errors_are_raised_by_the_call(session, video_model, stream):
    with pytest.raises(PromptError):
        session.aask(" ", stream=stream)
    with pytest.raises(OptionError):
        session.achat(STAR, temprature=1, stream=stream)
    with pytest.raises(VideoError):
        tieredkv.agenerate(video_model, "gone.mp4", STAR, stream=stream)
    with pytest.raises(OptionError, match="'gpu_gb' is not an option"):
        tieredkv.agenerate(video_model, np.zeros((4, 56, 56, 3), np.uint8), STAR, gpu_gb=3, stream=stream)
    with pytest.raises(OptionError, match="stream=True and streamer= were both given"):
        session.aask(STAR, stream=True, streamer=AsyncTextIteratorStreamer(session.processor.tokenizer))


async def test_an_error_of_the_work_reaches_the_awaiting_task(session, video_model, frames, opening):
    with pytest.raises(BudgetError):
        await session.aask(STAR, max_new_tokens=100_000)
    with pytest.raises(BudgetError):
        async for _ in session.aask(STAR, max_new_tokens=100_000, stream=True):
            pass
    with pytest.raises(BudgetError):
        await tieredkv.agenerate(video_model, frames, STAR, **{**opening, "gpu_kv_gb": 1e-7})
    assert (await session.aask(STAR, max_new_tokens=2)).token_ids


async def test_stop_criteria_and_asynchronous_streamers_of_transformers_work(session):
    def third(input_ids, scores, **kwargs):
        seen.append(1)
        return torch.full((1,), len(seen) == 3)

    seen: list[int] = []
    streamer = AsyncTextIteratorStreamer(session.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    asked = asyncio.create_task(
        session.aask(MOON, max_new_tokens=20, do_sample=False, stopping_criteria=[third], streamer=streamer)
    )
    text = "".join([piece async for piece in streamer])
    answer = await asked
    assert answer.stats.new_tokens == 3
    assert text == answer.text


@pytest.mark.parametrize("stop", ["cancel", "timeout"])
@pytest.mark.parametrize("stream", [False, True])
async def test_cancelling_stops_decoding_within_a_step(session, when_stopped, stop, stream):
    want = session.ask(STAR, max_new_tokens=4).token_ids
    gate = Gate(free=1)
    when_stopped(session, gate.open)

    async def work() -> None:
        options = {"max_new_tokens": 50, "stopping_criteria": [gate]}
        if stream:
            async for _ in session.achat(MOON, stream=True, **options):
                pass
        else:
            await session.achat(MOON, **options)

    if stop == "timeout":
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as limit:

                async def expire() -> None:
                    await reached(gate, 2)
                    limit.reschedule(asyncio.get_running_loop().time())

                expiring = asyncio.create_task(expire())
                await work()
        await expiring
    else:
        task = asyncio.create_task(work())
        await reached(gate, 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert gate.steps == 2
    assert "tieredkv-answer" not in our_threads()
    assert session.history == ()
    assert session._cached.cache.ledger.used_bytes == 0
    assert (await session.aask(STAR, max_new_tokens=4)).token_ids == want
    assert gate.steps == 2


async def test_cancelling_twice_still_waits_for_the_last_step(session):
    gate = Gate(free=1)
    task = asyncio.create_task(session.aask(MOON, max_new_tokens=50, stopping_criteria=[gate]))
    await reached(gate, 2)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "tieredkv-answer" not in our_threads()


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelling_agenerate_in_its_ingest_stops_it_and_frees_everything(
    video_model, frames, opening, caches, monkeypatch, stream
):
    family, stop = type(video_family(video_model.config)), VideoSession.stop
    decode, calls, started, go_on = family.decode, [], threading.Event(), threading.Event()

    def slow(self, *args):
        calls.append(1)
        if len(calls) == 2:
            started.set()
            assert go_on.wait(PATIENCE_S)
        return decode(self, *args)

    def stopping(self):
        stop(self)
        go_on.set()

    monkeypatch.setattr(family, "decode", slow)
    monkeypatch.setattr(VideoSession, "stop", stopping)

    async def work() -> None:
        if stream:
            async for _ in tieredkv.agenerate(video_model, frames, MOON, stream=True, **opening):
                pass
        else:
            await tieredkv.agenerate(video_model, frames, MOON, **opening)

    task = asyncio.create_task(work())
    assert await asyncio.to_thread(started.wait, PATIENCE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(calls) == 2
    assert our_threads() == []
    assert [cache.ledger.used_bytes + cache.host_bytes for cache in caches] == [0]


async def test_a_question_cancelled_while_it_waits_for_its_turn_ends_at_once(session):
    gate = Gate()
    first = asyncio.create_task(session.aask(MOON, max_new_tokens=2, stopping_criteria=[gate]))
    await reached(gate, 1)
    second = asyncio.create_task(session.aask(STAR))
    await asyncio.sleep(0)
    assert len(session._turns.line) == 2
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert not first.done()
    gate.open()
    assert (await first).token_ids


@pytest.mark.parametrize("way", ["aclose", "with", "break"])
async def test_leaving_an_asynchronous_stream_stops_the_work(session, when_stopped, way):
    gate = Gate(free=2)
    when_stopped(session, gate.open)
    options = {"max_new_tokens": 50, "stopping_criteria": [gate], "stream": True}
    if way == "break":
        async for _ in session.aask(MOON, **options):
            break
        for thread in threading.enumerate():
            assert thread.name != "tieredkv-answer" or await asyncio.to_thread(ended, thread)
    elif way == "with":
        async with session.aask(MOON, **options) as stream:
            await anext(stream)
    else:
        stream = session.aask(MOON, **options)
        await anext(stream)
        await stream.aclose()
        await stream.aclose()
    assert "tieredkv-answer" not in our_threads()
    assert gate.steps <= 3
    assert (await session.aask(STAR, max_new_tokens=3)).token_ids


async def test_a_stream_closed_by_another_task_ends_for_its_reader(session, when_stopped):
    gate, first = Gate(free=1), asyncio.Event()
    when_stopped(session, gate.open)
    stream = session.aask(MOON, max_new_tokens=50, stopping_criteria=[gate], stream=True)
    got: list[str] = []

    async def read() -> None:
        async for piece in stream:
            got.append(piece)
            first.set()

    reader = asyncio.create_task(read())
    await first.wait()
    await stream.aclose()
    await reader
    assert len(got) <= 2


async def test_a_stream_that_is_never_read_begins_nothing(session):
    stream = session.aask(MOON, stream=True)
    assert our_threads().count("tieredkv-answer") == 0
    await stream.aclose()
    assert [piece async for piece in stream] == []


async def test_questions_asked_at_once_take_turns(session):
    alone = {question: session.ask(question, max_new_tokens=5).token_ids for question in (STAR, MOON)}
    asked = [STAR, MOON, MOON, STAR]
    answers = await asyncio.gather(*(session.aask(question, max_new_tokens=5) for question in asked))
    assert [answer.token_ids for answer in answers] == [alone[question] for question in asked]
    await asyncio.gather(*(session.achat(question, max_new_tokens=2) for question in asked))
    assert [question for question, _ in session.history] == asked


def test_a_loop_that_closes_under_a_stream_stops_its_work(session):
    kept, gate = [], Gate(free=2)

    async def main() -> None:
        kept.append(session.aask(MOON, max_new_tokens=50, stopping_criteria=[gate], stream=True))
        await anext(kept[0])

    asyncio.run(main())
    gate.open()
    assert session.ask(STAR, max_new_tokens=2).token_ids
    assert gate.steps < 10  # noticed when a piece cannot be delivered


@contextlib.contextmanager
def modules_that_run_here() -> Iterator[set[str]]:
    """Modules of the package whose functions are called on this thread inside the block."""
    root, names = Path(tieredkv.__file__).parent, set()

    def called(frame, event, argument) -> None:
        if (path := Path(frame.f_code.co_filename)).is_relative_to(root):
            names.add(path.stem)

    gc.collect()
    gc.disable()  # it would run finalizers of other tests' sessions on this thread
    sys.setprofile(called)
    try:
        yield names
    finally:
        sys.setprofile(None)
        gc.enable()


@pytest.mark.parametrize("what", ["agenerate", "aask"])
async def test_the_event_loop_is_never_blocked(video_model, frames, opening, monkeypatch, what):
    """Each part of the work waits until the loop has run; the loop's thread only takes pieces."""
    family, loop, seen = type(video_family(video_model.config)), asyncio.get_running_loop(), set()
    parts = ("decode", "encode", "embed", "logits", "positions")
    for name in parts:
        method = getattr(family, name)

        def after_a_turn_of_the_loop(*args, method=method, name=name, **options):
            turn = threading.Event()
            loop.call_soon_threadsafe(turn.set)
            assert turn.wait(PATIENCE_S), f"the loop waits for {name}"
            seen.add(name)
            return method(*args, **options)

        monkeypatch.setattr(family, name, after_a_turn_of_the_loop)
    if what == "agenerate":
        work = tieredkv.agenerate(video_model, frames, MOON, max_new_tokens=4, **opening)
        with modules_that_run_here() as modules:
            await work
        assert seen == set(parts)
    else:
        async with contextlib.AsyncExitStack() as stack:
            open_session = partial(tieredkv.open_session, video_model, frames, **opening)
            session = stack.enter_context(await asyncio.to_thread(open_session))
            seen.clear()
            work = session.aask(MOON, max_new_tokens=4)
            with modules_that_run_here() as modules:
                await work
        assert {"decode", "logits"} <= seen
    assert modules == {"aio", "ambient", "job", "stream"}  # ambient records this thread's settings for the job's
