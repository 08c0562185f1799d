"""In a forked process a session works or raises an error; it never waits for threads that are lost."""

from __future__ import annotations

import asyncio
import atexit
import copy
import os
import pickle
import signal
import threading
import traceback

import pytest
import torch
from helpers import tier_options

import tieredkv
from tieredkv import TieredCache
from tieredkv.environment import forking, threads
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import TieredKVError
from tieredkv.memory.copies import ThreadCopies
from tieredkv.models.switch import use_attention
from tieredkv.session.pipeline import Pipeline
from tieredkv.video.sampling import Sampling

QUESTION = "what colour was the star ?"
OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4}

pytestmark = [
    pytest.mark.setups,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


def forked(work) -> str:
    """The result of `work` in a forked process, as text, or its error; the process has half a minute."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends a process that hangs
        try:
            torch.set_num_threads(1)
            output = str(work())
        except TieredKVError as error:
            output = f"TieredKVError: {error}"
        except BaseException:  # noqa: BLE001
            output = traceback.format_exc()
        os.write(writing, output.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        output = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return output if code == 0 else f"ended with {code}"


@pytest.fixture(scope="module")
def session(video_model, processor, frames):
    options = {"processor": processor, "fps": 4, "gpu_kv_gb": 1, "budget_ratio": 0.5, "chunk_tokens": 8}
    with tieredkv.open_session(video_model, frames, **tier_options(**options, text_window=4)) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(session):
    return session.ask(QUESTION, **OPTIONS).token_ids


@pytest.fixture
def at_work(session):
    """Another thread is in the middle of an answer from the session."""
    inside, go_on = threading.Event(), threading.Event()

    def wait(ids, scores):
        inside.set()
        go_on.wait(60)
        return scores

    options = {**OPTIONS, "logits_processor": [wait]}
    thread = threading.Thread(target=session.ask, args=(QUESTION,), kwargs=options)
    thread.start()
    assert inside.wait(60)
    yield
    go_on.set()
    thread.join()


def test_a_session_opened_before_the_fork_answers_in_the_child_and_in_the_parent(session, expected):
    assert forked(lambda: [session.ask(QUESTION, **OPTIONS).token_ids for _ in range(2)]) == str([expected, expected])
    assert session.ask(QUESTION, **OPTIONS).token_ids == expected


def test_a_session_answers_in_a_child_of_the_child_too(session, expected):
    assert forked(lambda: forked(lambda: session.ask(QUESTION, **OPTIONS).token_ids)) == str(expected)


def test_streams_and_asyncio_work_in_the_child(session, expected):
    def streamed():
        with session.ask(QUESTION, stream=True, **OPTIONS) as stream:
            list(stream)
            return stream.generation.token_ids

    async def awaited():
        return (await session.aask(QUESTION, **OPTIONS)).token_ids

    assert forked(streamed) == str(expected)
    assert forked(lambda: asyncio.run(awaited())) == str(expected)


def test_a_chat_in_the_child_leaves_the_history_of_the_parent(session):
    assert forked(lambda: len([session.chat(QUESTION, **OPTIONS), *session.history])) == "2"
    assert session.history == ()


def test_the_child_saves_and_loads(session, expected, video_model, processor, tmp_path):
    def work():
        session.save(tmp_path / "of the child.tkv")
        with tieredkv.load_session(tmp_path / "of the child.tkv", video_model, processor=processor) as loaded:
            return loaded.ask(QUESTION, **OPTIONS).token_ids

    assert forked(work) == str(expected)


def test_a_loaded_session_answers_in_the_child_and_its_file_stays(session, expected, video_model, processor, tmp_path):
    path = tmp_path / "session.tkv"
    session.save(path)
    with tieredkv.load_session(path, video_model, processor=processor) as loaded:
        assert forked(lambda: (loaded.ask(QUESTION, **OPTIONS).token_ids, loaded.close())[0]) == str(expected)
        assert loaded.ask(QUESTION, **OPTIONS).token_ids == expected


def test_a_session_can_be_opened_in_the_child(session, expected, video_model, processor, frames):
    def work():
        options = {"processor": processor, "fps": 4, "gpu_kv_gb": 1, "budget_ratio": 0.5, "chunk_tokens": 8}
        with tieredkv.open_session(video_model, frames, **tier_options(**options, text_window=4)) as opened:
            return opened.ask(QUESTION, **OPTIONS).token_ids

    assert forked(work) == str(expected)


def test_closing_in_the_child_leaves_the_session_of_the_parent_open(session, expected):
    assert forked(lambda: (session.close(), session.close())) == "(None, None)"
    assert session.ask(QUESTION, **OPTIONS).token_ids == expected


def test_no_thread_keeps_a_child_running(session):
    def work():
        session.ask(QUESTION, **OPTIONS)
        stream = session.ask(QUESTION, stream=True, **OPTIONS)
        atexit._run_exitfuncs()
        return stream._job.running

    assert forked(work) == "False"


@pytest.fixture
def several_threads():
    """torch has used two threads in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.rand(300, 300, dtype=torch.float32, device="cpu") @ torch.rand(2**21, device="cpu").exp_()[:90000].view(
        300, -1
    )
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(threads._setters() is None, reason="this torch is not built with OpenMP and MKL")
def test_a_child_computes_on_one_thread_if_the_parent_used_several(session, expected, several_threads):
    def work():
        torch.set_num_threads(2)
        return session.ask(QUESTION, **OPTIONS).token_ids, torch.get_num_threads()

    assert forked(work) == str((expected, 1))


@pytest.mark.skipif(threads._setters() is None, reason="this torch is not built with OpenMP and MKL")
def test_a_child_opens_a_session_if_the_parent_has_used_only_torch(
    video_model, processor, frames, several_threads, monkeypatch
):
    monkeypatch.setattr(forking, "_used", set())

    def work():
        torch.set_num_threads(2)
        with tieredkv.open_session(video_model, frames, processor=processor, fps=4, gpu_kv_gb=1) as opened:
            return len(opened.ask(QUESTION, **OPTIONS).token_ids)

    assert forked(work) == "4"


def test_a_child_raises_if_threads_cannot_be_limited(session, expected, several_threads, monkeypatch):
    monkeypatch.setattr(threads, "_setters", lambda: None)

    def work():
        torch.set_num_threads(2)
        try:
            session.ask(QUESTION, **OPTIONS)
        except TieredKVError as error:
            torch.set_num_threads(1)
            return error, session.ask(QUESTION, **OPTIONS).token_ids

    output = forked(work)
    assert "call torch.set_num_threads(1) first" in output
    assert str(expected) in output


def test_a_card_that_the_parent_used_is_refused(monkeypatch):
    monkeypatch.setattr(forking, "_used", {"cpu", "cuda"})
    assert "forked from one that used the card" in forked(lambda: forking.enter("cuda"))
    assert forked(lambda: forking.enter("cpu")) == "None"


def test_a_card_that_no_parent_used_is_accepted(monkeypatch):
    monkeypatch.setattr(forking, "_used", {"cpu"})
    assert forked(lambda: forking.enter("cuda")) == "None"


def test_a_session_at_work_in_another_thread_is_refused_in_the_child(session, at_work):
    assert "was at work in another thread" in forked(lambda: session.ask(QUESTION, **OPTIONS))
    assert "was at work in another thread" in forked(lambda: list(session.ask(QUESTION, stream=True, **OPTIONS)))
    assert forked(session.close) == "None"


def test_stock_transformers_works_in_the_child_while_a_thread_of_the_parent_answers(session, at_work):
    generate = lambda: session.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3).shape  # noqa: E731
    assert forked(generate) == "torch.Size([1, 6])"


def test_other_sessions_answer_in_the_child_while_a_thread_of_the_parent_answers(
    session, expected, video_model, processor, tmp_path, request
):
    session.save(tmp_path / "session.tkv")
    request.getfixturevalue("at_work")
    with tieredkv.load_session(tmp_path / "session.tkv", video_model, processor=processor) as other:
        assert forked(lambda: other.ask(QUESTION, **OPTIONS).token_ids) == str(expected)


def test_a_stream_half_read_is_refused_in_the_child_and_continues_in_the_parent(session, expected):
    with session.ask(QUESTION, stream=True, **OPTIONS) as stream:
        first = next(stream)
        assert "started before the process was forked" in forked(lambda: list(stream))
        assert forked(stream.close) == "None"
        assert forked(lambda: (stream.__exit__(None, None, None), list(stream))) == "(None, [])"
        assert first + "".join(stream) == stream.generation.text
        assert stream.generation.token_ids == expected


def test_an_asyncio_stream_half_read_is_refused_in_the_child(session):
    async def parent():
        async with session.aask(QUESTION, stream=True, **OPTIONS) as stream:
            await anext(stream)

            def child():
                asyncio.events._set_running_loop(None)  # as multiprocessing does
                return asyncio.run(anext(stream))

            return forked(child)

    assert "started before the process was forked" in asyncio.run(parent())


def test_an_answer_that_forks_ends_or_continues_in_the_child(session, expected):
    codes = []

    def fork(ids, scores):
        if not codes:
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                forks.append(True)
            else:
                codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return scores

    forks = []
    try:
        torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        got = session.ask(QUESTION, **OPTIONS, logits_processor=[fork]).token_ids
    except TieredKVError:
        if not forks:
            raise
        got = expected
    finally:
        if forks:
            os._exit(0 if got == expected else 1)
        torch.set_num_threads(torch_threads)
    assert codes == [0]
    assert got == expected


def test_an_ingest_in_another_thread_is_lost_in_the_child(video_model, processor, frames, monkeypatch):
    inside, go_on = threading.Event(), threading.Event()
    session = tieredkv.api.new_session(video_model, processor=processor, gpu_kv_gb=1)
    check = Pipeline.check

    def wait(self):
        inside.set()
        go_on.wait(60)
        check(self)

    monkeypatch.setattr(Pipeline, "check", wait)
    thread = threading.Thread(target=session.ingest, args=(frames, Sampling(fps=4)))
    thread.start()
    try:
        assert inside.wait(60)
        assert forked(session.close) == "None"
        assert "was at work in another thread" in forked(lambda: session.ask(QUESTION))
        assert "was at work in another thread" in forked(lambda: session.ingest(frames, Sampling(fps=4)))
    finally:
        go_on.set()
        thread.join()
        session.close()


def test_a_pipeline_of_the_parent_ends_in_the_child():
    with Pipeline() as pipeline:
        gate = threading.Event()
        items = pipeline.stage("waits", (gate.wait(60) for _ in range(2)))
        assert "forked while a video was being ingested" in forked(lambda: next(items))
        acquired, release = threading.Event(), threading.Event()

        def hold():
            with pipeline.changed:
                acquired.set()
                release.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        assert acquired.wait(60)
        assert forked(lambda: pipeline.__exit__()) == "None", "the child waits for a lost thread"
        release.set()
        thread.join()
        gate.set()


def test_a_cache_prefilled_before_the_fork_generates_in_the_child(llama, long_ids):
    def rest():
        with use_attention(llama):
            return llama.generate(long_ids, **cache_argument(cache), max_new_tokens=4)[0, -4:].tolist()

    cache = TieredCache(llama.config, **tier_options(gpu_kv_gb=1, budget_ratio=0.3, chunk_tokens=8, text_window=8))
    with cache, use_attention(llama), torch.no_grad():
        llama(long_ids[:, :-20], **cache_argument(cache))
        assert forked(rest) == str(rest())


def test_a_copy_outstanding_at_the_fork_is_an_error_in_the_child():
    gate, copies = threading.Event(), ThreadCopies()
    copies.submit("layer", lambda: int(gate.wait(60)))

    def work():
        with pytest.raises(TieredKVError, match="forked while keys and values were being copied"):
            copies.wait("layer")
        copies.submit("layer", lambda: 7)
        return copies.wait("layer")

    assert forked(work) == "7"
    assert forked(copies.drain) == "None"
    assert forked(copies.close) == "None"
    gate.set()
    assert copies.wait("layer") == 1
    copies.close()


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_objects_that_cannot_be_pickled_or_copied_say_what_to_do(session, llama, way):
    with pytest.raises(TieredKVError, match="save it, and give the other process the file for load_session"):
        way(session)
    with TieredCache(llama.config, gpu_kv_gb=1) as cache, pytest.raises(TieredKVError, match="make another"):
        way(cache)
    with (
        session.ask(QUESTION, stream=True, **OPTIONS) as stream,
        pytest.raises(TieredKVError, match="give its `generation`"),
    ):
        way(stream)


def test_an_answer_can_be_pickled(session):
    answer = session.ask(QUESTION, evidence="tokens", **OPTIONS)
    again = pickle.loads(pickle.dumps(answer))
    assert (again.text, again.token_ids, again.evidence.moments) == (
        answer.text,
        answer.token_ids,
        answer.evidence.moments,
    )
