"""Streams: the answer's text in whole characters as it is generated, stopped when the reader leaves."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from helpers import PATIENCE_S, Gate, ended, pressed, tier_options
from transformers import TextIteratorStreamer

import tieredkv
from tieredkv.errors import BudgetError, OptionError, PromptError, TieredKVError, VideoError
from tieredkv.session import generation

pytestmark = pytest.mark.threads
STAR, MOON = "what colour was the star ?", "follow the moon for 4 ?"


@pytest.fixture
def session(video_model, processor, frames, request):
    options = tier_options(chunk_tokens=8, recent_window=16, theta=0.4, prefill_chunk=getattr(request, "param", 4096))
    options |= pressed(video_model, 280, 0.6)
    with tieredkv.open_session(video_model, frames, processor=processor, fps=4, **options) as opened:
        yield opened


@pytest.fixture(autouse=True)
def no_thread_is_left(request):
    before = set(threading.enumerate())
    yield
    # Whoever drops a stream does not wait for its last step.
    assert all(ended(t) for t in threading.enumerate() if t not in before and t.name == "tieredkv-answer")


@pytest.mark.parametrize("way", ["ask", "chat"])
def test_the_pieces_are_the_text_of_the_answer_and_come_one_by_one(session, way):
    alone = getattr(session, way)(MOON, max_new_tokens=9)
    session.clear_history()
    stream = getattr(session, way)(MOON, max_new_tokens=9, stream=True)
    pieces = list(stream)
    assert "".join(pieces) == stream.generation.text == alone.text
    assert stream.generation.token_ids == alone.token_ids
    assert len(pieces) > 3
    assert all(pieces)


def test_a_piece_can_be_read_before_the_next_token_is_generated(session):
    gate = Gate(free=2)
    with session.ask(MOON, max_new_tokens=8, stream=True, stopping_criteria=[gate]) as stream:
        assert next(stream)
        assert gate.steps <= 3
        gate.open()


def test_generate_streams_and_closes_its_session(video_model, processor, frames):
    options = {"gpu_kv_gb": 1, "processor": processor, "fps": 4, "max_new_tokens": 5}
    alone = tieredkv.generate(video_model, frames, MOON, **options)
    before = set(threading.enumerate())
    stream = tieredkv.generate(video_model, frames, MOON, stream=True, **options)
    assert "".join(stream) == stream.generation.text == alone.text
    assert set(threading.enumerate()) <= before


def test_the_answer_is_not_there_before_the_end_nor_after_a_stop(session):
    stream = session.ask(MOON, max_new_tokens=6, stream=True)
    with pytest.raises(TieredKVError, match="read the stream to its end first"):
        stream.generation  # noqa: B018
    next(stream)
    stream.close()
    with pytest.raises(TieredKVError, match="ended before the answer was complete"):
        stream.generation  # noqa: B018
    assert list(stream) == []


@pytest.mark.parametrize("way", ["close", "with", "break", "drop"])
def test_leaving_a_stream_stops_the_work_within_a_step(session, when_stopped, way):
    want = session.ask(STAR, max_new_tokens=4).token_ids
    gate = Gate(free=2)
    options = {"max_new_tokens": 50, "stream": True, "stopping_criteria": [gate]}
    when_stopped(session, gate.open)
    if way == "break":
        for _ in session.ask(MOON, **options):
            break
    elif way == "with":
        with session.ask(MOON, **options) as stream:
            next(stream)
    else:
        stream = session.ask(MOON, **options)
        next(stream)
        if way == "close":
            stream.close()
        else:
            del stream
    assert session.ask(STAR, max_new_tokens=4).token_ids == want
    assert gate.steps <= 3


@pytest.mark.parametrize("session", [4], indirect=True)
def test_a_stream_closed_before_its_first_piece_stops_the_prefill_of_its_question(session, when_stopped, monkeypatch):
    family, calls, started, go_on = type(session.family), [], threading.Event(), threading.Event()
    decode = family.decode

    def slow(self, *args):
        calls.append(1)
        started.set()
        assert go_on.wait(PATIENCE_S)
        return decode(self, *args)

    monkeypatch.setattr(family, "decode", slow)
    stream = session.ask(" ".join([STAR] * 4), max_new_tokens=4, stream=True)  # calls of four tokens
    assert started.wait(PATIENCE_S)
    when_stopped(session, go_on.set)
    stream.close()
    assert len(calls) == 1
    assert session.ask(STAR, max_new_tokens=2).token_ids


def test_a_stream_closed_by_another_thread_ends_for_its_reader(session, when_stopped):
    gate, got, first = Gate(free=1), [], threading.Event()
    stream = session.ask(MOON, max_new_tokens=50, stream=True, stopping_criteria=[gate])

    def read() -> None:
        for piece in stream:
            got.append(piece)
            first.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert first.wait(PATIENCE_S)
    when_stopped(session, gate.open)
    stream.close()
    assert ended(reader)
    assert len(got) <= 2


def test_an_interrupt_while_waiting_for_a_piece_stops_the_work(session, monkeypatch):
    class Interrupted:
        def get(self):
            raise KeyboardInterrupt

    gate = Gate(free=2)
    stream = session.ask(MOON, max_new_tokens=50, stream=True, stopping_criteria=[gate])
    monkeypatch.setattr(stream, "_items", Interrupted())
    gate.open()
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert session._turns.line == type(session._turns.line)()
    assert session.ask(STAR, max_new_tokens=2).token_ids


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        (" ", {}, PromptError),
        (STAR, {"temprature": 1}, OptionError),
        (STAR, {"max_new_tokens": 0}, OptionError),
        (STAR, {"streamer": "a streamer"}, OptionError),
    ],
    ids=str,
)
def test_early_errors_are_raised_by_the_call(session, prompt, options, error):
    if "streamer" in options:
        options = {"streamer": TextIteratorStreamer(session.processor.tokenizer, timeout=PATIENCE_S)}
    with pytest.raises(error):
        session.ask(prompt, stream=True, **options)
    if streamer := options.get("streamer"):
        assert list(streamer) == [""], "its reader would wait forever"


def test_generate_refuses_at_the_call_too(video_model, processor):
    with pytest.raises(VideoError, match="no such file"):
        tieredkv.generate(video_model, "gone.mp4", STAR, stream=True, processor=processor)


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        (STAR, {"max_new_tokens": 100_000}, BudgetError, "lower max_new_tokens"),
        ("<|video_pad|>", {}, PromptError, "stands for the video"),
    ],
    ids=str,
)
def test_an_error_of_the_work_reaches_the_reader_once(session, prompt, options, error, message):
    stream = session.ask(prompt, stream=True, **options)
    with pytest.raises(error, match=message):
        list(stream)
    assert list(stream) == []
    with pytest.raises(TieredKVError, match="ended before"):
        stream.generation  # noqa: B018
    assert session.ask(STAR, max_new_tokens=2).token_ids


@pytest.mark.parametrize(
    ("raised", "expected"), [(KeyError("mine"), KeyError), (StopIteration("mine"), RuntimeError)], ids=repr
)
def test_an_error_of_a_callback_reaches_the_reader_after_the_pieces_before_it(session, raised, expected):
    calls, got = [], []

    def failing(input_ids, scores):
        calls.append(1)
        if len(calls) == 4:
            raise raised
        return scores

    with pytest.raises(expected):
        for piece in session.ask(MOON, max_new_tokens=8, stream=True, logits_processor=[failing]):
            got.append(piece)
    assert got, "the pieces before it are lost"
    assert session.ask(STAR, max_new_tokens=2).token_ids


@pytest.mark.parametrize("new", [3, 50], ids=["stopped at the last token", "stopped before"])
def test_a_turn_counts_only_when_its_answer_is_complete(session, when_stopped, new):
    gate = Gate(free=2)
    stream = session.chat(STAR, max_new_tokens=new, stream=True, stopping_criteria=[gate])
    gate.wait_for_step(3)
    when_stopped(session, gate.open)
    stream.close()
    assert session.history == ()
    stream = session.chat(STAR, max_new_tokens=3, stream=True)
    text = "".join(stream)
    assert session.history == ((STAR, text),)


def test_a_stream_can_be_left_unread_while_another_is_read(session):
    want = [session.ask(question, max_new_tokens=6).text for question in (STAR, MOON)]
    first = session.ask(STAR, max_new_tokens=6, stream=True)
    second = session.ask(MOON, max_new_tokens=6, stream=True)
    head = next(second)
    assert [("".join(first)), head + "".join(second)] == want


def test_streams_take_turns_in_the_order_in_which_they_began(session):
    gate, questions = Gate(), [STAR, MOON, STAR, MOON, STAR]
    streams = [session.chat(questions[0], max_new_tokens=3, stream=True, stopping_criteria=[gate])]
    streams += [session.chat(question, max_new_tokens=3, stream=True) for question in questions[1:]]
    gate.open()
    answers = ["".join(stream) for stream in reversed(streams)][::-1]
    assert session.history == tuple(zip(questions, answers, strict=True))


@pytest.mark.parametrize("earlier", ["ask", "stream"])
def test_a_stream_that_waits_for_its_turn_is_closed_at_once(session, earlier):
    gate = Gate()
    if earlier == "stream":
        ahead = session.ask(STAR, max_new_tokens=2, stream=True, stopping_criteria=[gate])
    else:
        ahead = threading.Thread(target=session.ask, args=(STAR,), kwargs={"stopping_criteria": [gate]})
        ahead.start()
    gate.wait_for_step(1)
    late = session.ask(MOON, max_new_tokens=2, stream=True)
    late.close()  # would wait forever
    gate.open()
    if earlier == "stream":
        assert list(ahead)
    else:
        ahead.join()
    assert session.ask(STAR, max_new_tokens=2).token_ids


def test_closing_the_session_stops_its_streams_with_an_error_for_their_readers(session, when_stopped):
    gate = Gate(free=1)
    running = session.ask(MOON, max_new_tokens=50, stream=True, stopping_criteria=[gate])
    waiting = session.ask(MOON, max_new_tokens=4, stream=True)
    next(running)
    when_stopped(session, gate.open)
    cache = session._cached.cache
    session.close()
    assert gate.steps <= 2
    assert cache.ledger.used_bytes == cache.host_bytes == 0
    with pytest.raises(TieredKVError, match="closed before the answer was complete"):
        list(running)
    with pytest.raises(TieredKVError, match="this session is closed"):
        list(waiting)
    with pytest.raises(TieredKVError, match="this session is closed"):
        session.ask(MOON, stream=True)


def test_stop_strings_and_stopping_criteria_end_a_stream(session, byte_tokenizer, monkeypatch):
    run, options = generation.run, {"max_new_tokens": 50, "do_sample": False}
    ids = session.ask(MOON, **options).token_ids
    # What stop strings are spelled with, the template aside.
    monkeypatch.setattr(generation, "run", lambda *arguments: run(*arguments[:-1], byte_tokenizer))
    stream = session.ask(MOON, stop_strings=[byte_tokenizer.decode(ids[2])], stream=True, **options)
    assert "".join(stream) == stream.generation.text
    assert stream.generation.token_ids == ids[: ids.index(ids[2]) + 1]

    def third(input_ids, scores, **kwargs):
        seen.append(1)
        return torch.full((1,), len(seen) == 4)

    seen: list[int] = []
    stream = session.ask(MOON, max_new_tokens=50, stopping_criteria=[third], stream=True)
    assert list(stream)
    assert stream.generation.stats.new_tokens == 4


@pytest.mark.subprocess
def test_a_program_that_ends_with_a_stream_half_read_ends_soon():
    program = """
import sys, torch, tieredkv, numpy as np
from tieredkv.tiny.model import build_model, build_processor
torch.manual_seed(0)
model = build_model().eval()
model.generation_config.eos_token_id = None
frames = np.zeros((20, 56, 56, 3), np.uint8)
session = tieredkv.open_session(model, frames, gpu_kv_gb=1, processor=build_processor(), fps=4)
stream = session.ask("what colour was the star ?", max_new_tokens=20_000, stream=True)
next(stream)
print("half read", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=2 * PATIENCE_S)
    _, half_read, at_the_end = done.stderr.partition("half read\n")
    assert (done.returncode, half_read, at_the_end) == (0, "half read\n", ""), done.stderr
