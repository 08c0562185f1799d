"""torch settings of a user's script change no answer, except as they change stock transformers' answers."""

from __future__ import annotations

import ast
import asyncio
import gc
import random
import threading
import traceback
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from ambient_examples import OPTIONS, QUESTION, TIGHT
from families import BUILD, build
from helpers import RecordLogits, session_logits, tier_options
from torch.utils._python_dispatch import TorchDispatchMode

import tieredkv
from tieredkv import TieredCache
from tieredkv.environment.ambient import Ambient
from tieredkv.environment.versions import cache_argument
from tieredkv.models import families
from tieredkv.models.families.base import VideoGrid
from tieredkv.models.switch import use_attention
from tieredkv.policy.presets import POLICIES
from tieredkv.session.pipeline import Pipeline

pytestmark = pytest.mark.setups

PACKAGE = Path(tieredkv.__file__).parent


@contextmanager
def restored(setting, getting, value):
    before = getting()
    setting(value)
    try:
        yield
    finally:
        setting(before)


@contextmanager
def default_device(name):
    """Set by `torch.set_default_device`, not by a context manager."""
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


STATES = {
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "default float64": lambda: restored(torch.set_default_dtype, torch.get_default_dtype, torch.float64),
    "default bfloat16": lambda: restored(torch.set_default_dtype, torch.get_default_dtype, torch.bfloat16),
    "default float16": lambda: restored(torch.set_default_dtype, torch.get_default_dtype, torch.float16),
    "in a device's context": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
    "deterministic, memory filled": deterministic,
    "one thread": lambda: restored(torch.set_num_threads, torch.get_num_threads, 1),
    "anomaly detection": torch.autograd.detect_anomaly,
}


@pytest.fixture(scope="module")
def few(frames):
    return frames[:48]


@pytest.fixture
def answers(video_model, processor, few, tmp_path):
    """A function that returns the answers of every entry point, by name, with logits."""

    def logits(session, **options):
        record = RecordLogits()
        answer = session.ask(QUESTION, **OPTIONS, logits_processor=[record], **options)
        evidence = answer.evidence
        plain = evidence and (evidence.moments, evidence.heat, evidence.tokens)
        return answer.token_ids, torch.cat(record.seen), plain

    def take():
        yield (
            "generate",
            tieredkv.generate(
                video_model, few, QUESTION, processor=processor, **tier_options(**TIGHT), **OPTIONS
            ).token_ids,
        )
        with tieredkv.open_session(video_model, few, processor=processor, **tier_options(**TIGHT)) as session:
            yield "ask", logits(session, evidence="tokens")
            yield "no evidence", logits(session, evidence=False)
            yield "chat", [session.chat(QUESTION, **OPTIONS).token_ids for _ in range(2)]
            with session.ask(QUESTION, stream=True, **OPTIONS) as stream:
                yield "stream", list(stream)
            yield "asyncio", asyncio.run(session.aask(QUESTION, **OPTIONS)).token_ids
            session.save(tmp_path / "session.tkv")
        for more in ({}, {"policy": "full"}, {"prefill_chunk": 32, "gpu_kv_gb": 0.0005}):
            with tieredkv.load_session(tmp_path / "session.tkv", video_model, processor=processor, **more) as loaded:
                yield f"loaded {more}", logits(loaded)

    return lambda: dict(take())


def same(ours, plain):
    if isinstance(plain, torch.Tensor):
        return ours.dtype == plain.dtype and torch.equal(ours, plain)
    if isinstance(plain, tuple | list):
        return len(ours) == len(plain) and all(map(same, ours, plain))
    return ours == plain


@pytest.fixture(scope="module")
def plain():
    """The answers when nothing is set, computed once."""
    return {}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("state", STATES)
def test_settings_of_the_caller_change_no_answer(answers, plain, state):
    plain = plain or plain.update(answers()) or plain
    with STATES[state]():
        ours = answers()
    assert ours.keys() == plain.keys()
    assert [name for name in plain if not same(ours[name], plain[name])] == []


@contextmanager
def everything(dtype):
    """All settings at once, except those that exclude each other."""
    with STATES["in a device's context"](), STATES["inference mode"](), deterministic():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_settings_of_the_caller_change_no_answer_under_any_policy(video_model, processor, few, policy, dtype):
    def answer():
        with tieredkv.open_session(
            video_model, few, processor=processor, **tier_options(policy=policy, **TIGHT)
        ) as session:
            return session_logits(session, QUESTION, 3)

    plain = answer()
    with everything(dtype):
        ours = answer()
    assert same(ours, plain)


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("positions", ["published", "stock"])
def test_a_default_dtype_changes_no_answer_of_any_family(name, few, positions):
    model, processor = build(name)

    def answer():
        options = {"processor": processor, "gpu_kv_gb": 1, "fps": 4, "positions": positions}
        with tieredkv.open_session(model, few[:6], **options) as session:
            return session_logits(session, "what is it ?", 3)

    plain = answer()
    for dtype in (torch.bfloat16, torch.float64):
        with restored(torch.set_default_dtype, torch.get_default_dtype, dtype):
            assert same(answer(), plain)


def test_every_tensor_that_the_package_creates_names_its_dtype_and_device():
    """Otherwise torch's defaults, which scripts may set, would change results."""
    makers = ("empty", "zeros", "ones", "full", "eye", "tensor", "as_tensor", "linspace", "arange", "rand", "randn")
    training = {"train.py", "train_decoder.py", "train_vision.py", "evaluate.py"}
    missing = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())) if path.name not in training else ():
            match node:
                case ast.Call(ast.Attribute(ast.Name("torch"), name), _, keywords) if name in makers:
                    named = {keyword.arg for keyword in keywords} | ({"dtype"} if name == "arange" else set())
                    if not {"dtype", "device"} <= named:
                        missing.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}")
    assert missing == []


# ---- one mode first, another later


MODES = {"inference mode": torch.inference_mode, "gradients": torch.enable_grad}


@pytest.mark.parametrize("later", MODES)
@pytest.mark.parametrize("first", MODES)
def test_a_session_continues_in_another_mode(video_model, processor, few, tmp_path, first, later):
    def answers(session):
        with session.ask(QUESTION, stream=True, **OPTIONS) as stream:
            list(stream)
            return [session.ask(QUESTION, **OPTIONS).token_ids, stream.generation.token_ids]

    with (
        MODES[first](),
        tieredkv.open_session(video_model, few, processor=processor, **tier_options(**TIGHT)) as session,
    ):
        want = answers(session)
        with MODES[later]():
            assert answers(session) == want
            session.save(tmp_path / "session.tkv")
    with MODES[first]():
        loaded = tieredkv.load_session(tmp_path / "session.tkv", video_model, processor=processor)
    with loaded, MODES[later]():
        assert [answers(loaded) for _ in range(2)] == [want, want]
        loaded.save(tmp_path / "again.tkv")


@pytest.mark.parametrize("later", MODES)
@pytest.mark.parametrize("first", MODES)
def test_a_cache_continues_in_another_mode(text_model, long_ids, first, later):
    prompt, new = long_ids[:, :200], long_ids[:, 200:204]

    def logits(first, later):
        options = {"gpu_kv_gb": 1, "budget_ratio": 0.3, "chunk_tokens": 8, "text_window": 8, "prompt_tokens": 200}
        with use_attention(text_model), TieredCache(text_model.config, **tier_options(**options)) as cache:
            with first():
                text_model(prompt[:, :120], **cache_argument(cache))
            with later():
                text_model(prompt[:, 120:], **cache_argument(cache))
                out = [text_model(token[:, None], **cache_argument(cache)).logits for token in new.T]
            with first():
                out.append(text_model(new, **cache_argument(cache)).logits)
                return [one.detach() for one in out]

    want = logits(torch.no_grad, torch.no_grad)
    got = logits(MODES[first], MODES[later])
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


# ---- gradients


def test_a_forward_pass_with_gradients_leaves_no_graph(text_model, long_ids):
    def graphs():
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) and one.grad_fn is not None for one in gc.get_objects())

    gc.freeze()  # looks at nothing that other tests left
    with use_attention(text_model), TieredCache(text_model.config, **tier_options(gpu_kv_gb=1, text_window=8)) as cache:
        for part in (long_ids[:, :100], long_ids[:, 100:150], *long_ids[:, 150:155].T[:, None]):
            assert text_model(part, **cache_argument(cache)).logits.requires_grad, "as in stock transformers"
        kept = graphs()
    gc.unfreeze()
    assert kept == 0


def test_a_gradient_through_a_cache_is_refused(llama, long_ids):
    with use_attention(llama), TieredCache(llama.config, gpu_kv_gb=1) as cache:
        loss = llama(long_ids[:, :50], **cache_argument(cache)).logits.sum()
        with pytest.raises(RuntimeError, match="a TieredCache keeps no gradients"):
            loss.backward()


# ---- random numbers


def test_greedy_answers_and_ingest_leave_random_generators_unchanged(answers):
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    answers()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_a_sampled_stream_equals_a_sampled_answer(video_model, processor, few):
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.5}
    with tieredkv.open_session(video_model, few, processor=processor, **tier_options(**TIGHT)) as session:
        torch.manual_seed(5)
        plain = session.ask(QUESTION, **options).token_ids
        torch.manual_seed(5)
        with session.ask(QUESTION, stream=True, **options) as stream:
            list(stream)
        assert stream.generation.token_ids == plain


# ---- other threads


def in_a_thread(work):
    got = []
    thread = threading.Thread(target=lambda: got.append(work()))
    thread.start()
    thread.join()
    return got[0]


def now():
    cast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    return *cast, torch.is_inference_mode_enabled(), torch.get_default_device().type


def test_settings_are_applied_to_another_thread_and_restored():
    with torch.autocast("cpu", dtype=torch.float16), torch.inference_mode(), torch.device("meta"):
        ambient, set_here = Ambient(device=True), now()

    def work():
        before = now()
        with ambient.here():
            inside = now()
        return before, inside, now()

    before, inside, after = in_a_thread(work)
    assert inside == set_here == (True, torch.float16, True, "meta")
    assert after == before == (False, torch.bfloat16, False, "cpu")


def test_weights_converted_on_another_stream_are_not_kept():
    """The model would use them without waiting for that stream."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept, own = Ambient(), Ambient(stream=False)
        with own.here():
            assert torch.is_autocast_enabled("cpu")
            assert not torch.is_autocast_cache_enabled()
        with kept.here():
            assert torch.is_autocast_cache_enabled()
        assert torch.is_autocast_cache_enabled()


def test_stages_run_under_the_settings_of_their_creator():
    with torch.autocast("cpu", dtype=torch.float16), torch.inference_mode(), Pipeline() as pipeline:
        assert next(pipeline.stage("looks", (now() for _ in range(1))))[:3] == (True, torch.float16, True)


def test_callbacks_of_a_stream_run_under_the_callers_default_device(video_model, processor, few):
    devices = set()

    def look(ids, scores):
        devices.add(torch.zeros(1).device.type)
        return scores

    with (
        tieredkv.open_session(video_model, few, processor=processor, **tier_options(**TIGHT)) as session,
        torch.device("meta"),
    ):
        with session.ask(QUESTION, stream=True, logits_processor=[look], **OPTIONS) as stream:
            list(stream)
        session.ask(QUESTION, logits_processor=[look], **OPTIONS)
    assert devices == {"meta"}


def test_settings_of_the_caller_change_no_plan_and_no_evidence_page(video_model, processor, few, tmp_path):
    def take():
        plan = tieredkv.plan(video_model, few, processor=processor, host_kv_gb=1, **tier_options(**TIGHT))
        with tieredkv.open_session(video_model, few, processor=processor, **tier_options(**TIGHT)) as session:
            answer = session.ask(QUESTION, evidence="tokens", **OPTIONS)
        tieredkv.save_evidence(answer, tmp_path / "page.html", question=QUESTION, video=few, source_fps=4)
        return str(plan), (tmp_path / "page.html").read_text()

    plain = take()
    with everything(torch.float16):
        assert take() == plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_numbers_are_not_counted_in_a_small_default_dtype(video_model, processor, dtype):
    """Counts of tens of thousands of tokens, which the short videos above do not reach."""
    grid = VideoGrid(steps=3001, rows=2, columns=2, seconds_per_step=0.75)
    family = families.video_family(video_model.config)

    def take():
        positions = family.positions(video_model, 7, grid, 0, grid.tokens + 20, "published")
        plan = tieredkv.plan(video_model.config, 50_001, gpu_kv_gb=0.05, host_kv_gb=1)
        return positions, str(plan)

    plain = take()
    with restored(torch.set_default_dtype, torch.get_default_dtype, dtype):
        assert same(take(), plain)


@pytest.mark.parametrize("options", [TIGHT, {**TIGHT, "adaptive": True}, {**TIGHT, "reuse_above": 0.5}], ids=str)
def test_nothing_is_computed_in_the_default_dtype(video_model, processor, few, options):
    """An integer tensor times a fraction would be: exact for small numbers only."""
    found = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.bfloat16:
                frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
                caller = Path(frames[-2].filename)
                if PACKAGE in caller.parents:
                    found.add(f"{caller.relative_to(PACKAGE)}:{frames[-2].lineno}: {function}")
            return out

    with restored(torch.set_default_dtype, torch.get_default_dtype, torch.bfloat16), Watch():
        tieredkv.plan(video_model.config, 50_001, gpu_kv_gb=0.05, host_kv_gb=1)
        with tieredkv.open_session(video_model, few, processor=processor, **tier_options(**options)) as session:
            session.ask(QUESTION, evidence="tokens", **OPTIONS)
    counted = ("planning/forecast.py", "models/weights.py")  # a model's weights, which have that dtype
    assert {place for place in found if not place.startswith(counted)} == set()
