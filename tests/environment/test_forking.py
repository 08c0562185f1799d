"""In a forked process a session works or says why not; it never waits for threads that are not there."""

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

import tieredkv
from tieredkv import TieredCache
from tieredkv.environment import forking, threads
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import TieredKVError
from tieredkv.memory.copies import ThreadPrefetcher
from tieredkv.models.switch import use_attention
from tieredkv.session.pipeline import Pipeline
from tieredkv.video.frames import Sampling

QUESTION = "what colour was the star ?"
OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4}

pytestmark = [
    pytest.mark.setups,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


def forked(work) -> str:
    """What `work` gives in a forked process, which has half a minute, or the name and text of its error."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends a process that hangs
        try:
            torch.set_num_threads(1)
            said = str(work())
        except TieredKVError as error:
            said = f"TieredKVError: {error}"
        except BaseException:  # noqa: BLE001
            said = traceback.format_exc()
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return said if code == 0 else f"ended with {code}"


@pytest.fixture(scope="module")
def session(video_model, processor, frames):
    options = {"processor": processor, "fps": 4, "gpu_kv_gb": 1, "budget_ratio": 0.5, "chunk_tokens": 8}
    with tieredkv.open_session(video_model, frames, **options, text_window=4) as opened:
        yield opened


@pytest.fixture(scope="module")
def want(session):
    return session.ask(QUESTION, **OPTIONS).token_ids


@pytest.fixture
def at_work(session):
    """Another thread is in the middle of an answer to the session."""
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


def test_a_session_opened_before_the_fork_answers_in_the_child_and_in_the_parent(session, want):
    assert forked(lambda: [session.ask(QUESTION, **OPTIONS).token_ids for _ in range(2)]) == str([want, want])
    assert session.ask(QUESTION, **OPTIONS).token_ids == want


def test_a_childs_child_answers_too(session, want):
    assert forked(lambda: forked(lambda: session.ask(QUESTION, **OPTIONS).token_ids)) == str(want)


def test_streams_and_asyncio_work_in_the_child(session, want):
    def streamed():
        with session.ask(QUESTION, stream=True, **OPTIONS) as stream:
            list(stream)
            return stream.generation.token_ids

    async def awaited():
        return (await session.aask(QUESTION, **OPTIONS)).token_ids

    assert forked(streamed) == str(want)
    assert forked(lambda: asyncio.run(awaited())) == str(want)


def test_a_chat_goes_on_in_the_child_and_leaves_the_parents_history(session):
    assert forked(lambda: len([session.chat(QUESTION, **OPTIONS), *session.history])) == "2"
    assert session.history == ()


def test_the_child_saves_and_loads(session, want, video_model, processor, tmp_path):
    def work():
        session.save(tmp_path / "of the child.tkv")
        with tieredkv.load_session(tmp_path / "of the child.tkv", video_model, processor=processor) as loaded:
            return loaded.ask(QUESTION, **OPTIONS).token_ids

    assert forked(work) == str(want)


def test_a_loaded_session_answers_in_the_child_and_its_file_stays(session, want, video_model, processor, tmp_path):
    path = tmp_path / "session.tkv"
    session.save(path)
    with tieredkv.load_session(path, video_model, processor=processor) as loaded:
        assert forked(lambda: (loaded.ask(QUESTION, **OPTIONS).token_ids, loaded.close())[0]) == str(want)
        assert loaded.ask(QUESTION, **OPTIONS).token_ids == want


def test_a_session_is_opened_in_the_child(session, want, video_model, processor, frames):
    def work():
        options = {"processor": processor, "fps": 4, "gpu_kv_gb": 1, "budget_ratio": 0.5, "chunk_tokens": 8}
        with tieredkv.open_session(video_model, frames, **options, text_window=4) as opened:
            return opened.ask(QUESTION, **OPTIONS).token_ids

    assert forked(work) == str(want)


def test_closing_in_the_child_leaves_the_parent_its_session(session, want):
    assert forked(lambda: (session.close(), session.close())) == "(None, None)"
    assert session.ask(QUESTION, **OPTIONS).token_ids == want


def test_a_child_ends_by_itself(session):
    def work():
        session.ask(QUESTION, **OPTIONS)
        stream = session.ask(QUESTION, stream=True, **OPTIONS)
        atexit._run_exitfuncs()
        return stream._job.running

    assert forked(work) == "False"


@pytest.fixture
def several_threads():
    """torch has used two threads in this process, whoever asked it to."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.rand(300, 300, dtype=torch.float32, device="cpu") @ torch.rand(2**21, device="cpu").exp_()[:90000].view(
        300, -1
    )
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(threads._setters() is None, reason="this torch is not built with OpenMP and MKL")
def test_a_child_computes_on_one_thread_where_the_parent_used_several(session, want, several_threads):
    def work():
        torch.set_num_threads(2)
        return session.ask(QUESTION, **OPTIONS).token_ids, torch.get_num_threads()

    assert forked(work) == str((want, 1))


@pytest.mark.skipif(threads._setters() is None, reason="this torch is not built with OpenMP and MKL")
def test_a_child_opens_a_session_though_the_parent_has_used_torch_alone(
    video_model, processor, frames, several_threads, monkeypatch
):
    monkeypatch.setattr(forking, "_used", set())

    def work():
        torch.set_num_threads(2)
        with tieredkv.open_session(video_model, frames, processor=processor, fps=4, gpu_kv_gb=1) as opened:
            return len(opened.ask(QUESTION, **OPTIONS).token_ids)

    assert forked(work) == "4"


def test_where_threads_cannot_be_limited_the_child_says_so(session, want, several_threads, monkeypatch):
    monkeypatch.setattr(threads, "_setters", lambda: None)

    def work():
        torch.set_num_threads(2)
        try:
            session.ask(QUESTION, **OPTIONS)
        except TieredKVError as error:
            torch.set_num_threads(1)
            return error, session.ask(QUESTION, **OPTIONS).token_ids

    said = forked(work)
    assert "call torch.set_num_threads(1) first" in said
    assert str(want) in said


def test_a_card_that_the_parent_used_is_refused(monkeypatch):
    monkeypatch.setattr(forking, "_used", {"cpu", "cuda"})
    assert "forked from one that used the card" in forked(lambda: forking.enter("cuda"))
    assert forked(lambda: forking.enter("cpu")) == "None"


def test_a_card_that_no_parent_used_is_not(monkeypatch):
    monkeypatch.setattr(forking, "_used", {"cpu"})
    assert forked(lambda: forking.enter("cuda")) == "None"


def test_a_session_at_work_in_another_thread_is_refused_in_the_child(session, at_work):
    assert "was at work in another thread" in forked(lambda: session.ask(QUESTION, **OPTIONS))
    assert "was at work in another thread" in forked(lambda: list(session.ask(QUESTION, stream=True, **OPTIONS)))
    assert forked(session.close) == "None"


def test_stock_transformers_works_in_the_child_while_another_thread_of_the_parent_answers(session, at_work):
    generate = lambda: session.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3).shape  # noqa: E731
    assert forked(generate) == "torch.Size([1, 6])"


def test_other_sessions_answer_in_the_child_meanwhile(session, want, video_model, processor, tmp_path, request):
    session.save(tmp_path / "session.tkv")
    request.getfixturevalue("at_work")
    with tieredkv.load_session(tmp_path / "session.tkv", video_model, processor=processor) as other:
        assert forked(lambda: other.ask(QUESTION, **OPTIONS).token_ids) == str(want)


def test_a_stream_half_read_is_refused_in_the_child_and_goes_on_in_the_parent(session, want):
    with session.ask(QUESTION, stream=True, **OPTIONS) as stream:
        first = next(stream)
        assert "begun before the process was forked" in forked(lambda: list(stream))
        assert forked(stream.close) == "None"
        assert forked(lambda: (stream.__exit__(None, None, None), list(stream))) == "(None, [])"
        assert first + "".join(stream) == stream.generation.text
        assert stream.generation.token_ids == want


def test_an_answer_of_asyncio_half_read_is_refused_in_the_child(session):
    async def parent():
        async with session.aask(QUESTION, stream=True, **OPTIONS) as stream:
            await anext(stream)

            def child():
                asyncio.events._set_running_loop(None)  # as multiprocessing does
                return asyncio.run(anext(stream))

            return forked(child)

    said = asyncio.run(parent())
    assert "begun before the process was forked" in said


def test_a_fork_from_within_an_answer_ends_it_in_the_child_or_goes_on(session, want):
    said = []

    def fork(ids, scores):
        if not said:
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                forks.append(True)
            else:
                said.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return scores

    forks = []
    try:
        torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        got = session.ask(QUESTION, **OPTIONS, logits_processor=[fork]).token_ids
    except TieredKVError:
        if not forks:
            raise
        got = want
    finally:
        if forks:
            os._exit(0 if got == want else 1)
        torch.set_num_threads(torch_threads)
    assert said == [0]
    assert got == want


def test_an_ingest_of_another_thread_is_over_in_the_child(video_model, processor, frames, monkeypatch):
    inside, go_on = threading.Event(), threading.Event()
    session = tieredkv.api.new_session(video_model, processor=processor, gpu_kv_gb=1)
    check = Pipeline.check

    def held(self):
        inside.set()
        go_on.wait(60)
        check(self)

    monkeypatch.setattr(Pipeline, "check", held)
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
        held, give_back = threading.Event(), threading.Event()

        def hold():
            with pipeline.changed:
                held.set()
                give_back.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(60)
        assert forked(lambda: pipeline.__exit__()) == "None", "the child waits for a thread that it does not have"
        give_back.set()
        thread.join()
        gate.set()


def test_a_cache_prefilled_before_the_fork_goes_on_in_the_child(llama, long_ids):
    def rest():
        with use_attention(llama):
            return llama.generate(long_ids, **cache_argument(cache), max_new_tokens=4)[0, -4:].tolist()

    cache = TieredCache(llama.config, gpu_kv_gb=1, budget_ratio=0.3, chunk_tokens=8, text_window=8)
    with cache, use_attention(llama), torch.no_grad():
        llama(long_ids[:, :-20], **cache_argument(cache))
        assert forked(rest) == str(rest())


def test_a_copy_outstanding_at_the_fork_is_an_error_in_the_child():
    gate, prefetcher = threading.Event(), ThreadPrefetcher()
    prefetcher.submit("layer", lambda: int(gate.wait(60)))

    def work():
        with pytest.raises(TieredKVError, match="forked while keys and values were being copied"):
            prefetcher.wait("layer")
        prefetcher.submit("layer", lambda: 7)
        return prefetcher.wait("layer")

    assert forked(work) == "7"
    assert forked(prefetcher.drain) == "None"
    assert forked(prefetcher.close) == "None"
    gate.set()
    assert prefetcher.wait("layer") == 1
    prefetcher.close()


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_what_cannot_go_to_another_process_says_what_to_do(session, llama, way):
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
    made = session.ask(QUESTION, evidence="tokens", **OPTIONS)
    again = pickle.loads(pickle.dumps(made))
    assert (again.text, again.token_ids, again.evidence.moments) == (made.text, made.token_ids, made.evidence.moments)
