"""One video, many questions: each as if asked first, and nothing left on the model."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from helpers import RecordLogits, assert_near, cap_share, pressed, stock_inputs, stock_logits, tier_options

import tieredkv
from tieredkv.errors import BudgetError, PromptError, TieredKVError

STAR, MOON = "what colour was the star ?", "follow the moon for 4 ?"
TIGHT = {"chunk_tokens": 8, "recent_window": 16, "theta": 0.4}


@pytest.fixture
def opened(video_model, processor, frames):
    """Opens sessions under a cap of a share of the full cache, and closes them."""
    sessions = []

    def open_one(video=frames, share=0.6, **options):
        tokens = 2 * len(video) + 40
        session = tieredkv.open_session(
            video_model,
            video,
            **pressed(video_model, tokens, share),
            processor=processor,
            fps=4,
            **tier_options(**{**TIGHT, **options}),
        )
        sessions.append(session)
        return session

    yield open_one
    for session in sessions:
        session.close()


def test_a_question_is_answered_as_if_asked_first(opened):
    session = opened()
    first = session.ask(STAR, max_new_tokens=8)
    session.ask(MOON, max_new_tokens=5)
    again = session.ask(STAR, max_new_tokens=8)
    assert again.token_ids == first.token_ids
    assert opened().ask(MOON, max_new_tokens=8).token_ids == session.ask(MOON, max_new_tokens=8).token_ids


def test_two_interleaved_sessions_answer_as_each_alone(opened, frames):
    other = frames[::-1][:80]
    alone = [opened().ask(q, max_new_tokens=6).token_ids for q in (STAR, MOON)]
    alone_other = [opened(other).ask(q, max_new_tokens=6).token_ids for q in (STAR, MOON)]
    one = opened()
    first = one.ask(STAR, max_new_tokens=6).token_ids
    two = opened(other)
    interleaved_other = [two.ask(STAR, max_new_tokens=6).token_ids]
    second = one.ask(MOON, max_new_tokens=6).token_ids
    interleaved_other.append(two.ask(MOON, max_new_tokens=6).token_ids)
    assert [first, second] == alone
    assert interleaved_other == alone_other


def test_sessions_decoding_at_once_in_two_threads_do_not_mix(opened, frames):
    sessions = [opened(), opened(frames[::-1])]
    alone = [session.ask(STAR, max_new_tokens=12).token_ids for session in sessions]
    got = [None, None]

    def work(index: int) -> None:
        got[index] = sessions[index].ask(STAR, max_new_tokens=12).token_ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == alone


def test_nothing_is_left_on_the_model(video_model, opened):
    video_model.model.rope_deltas = None
    before = video_model.config.text_config._attn_implementation
    opened().ask(STAR, max_new_tokens=3)
    assert video_model.model.rope_deltas is None
    assert video_model.config.text_config._attn_implementation == before


def test_prefetching_changes_no_answer(opened):
    reuse = {"theta": 2.0, "reuse_above": -1.0, "share": 0.8}
    with_it, without = opened(**reuse), opened(prefetch=False, **reuse)
    record, plain = RecordLogits(), RecordLogits()
    copied = with_it.ask(MOON, max_new_tokens=10, logits_processor=[record]).stats.prefetched_bytes
    assert copied > without.ask(MOON, max_new_tokens=10, logits_processor=[plain]).stats.prefetched_bytes == 0
    assert torch.equal(torch.cat(record.seen), torch.cat(plain.seen))


def test_frames_as_tensor_array_images_or_channels_first_are_one_video(opened, frames):
    from PIL import Image

    video = frames[:40]
    want = opened(video, share=0.8).ask(STAR, max_new_tokens=6).token_ids
    forms = [
        torch.from_numpy(video),
        np.ascontiguousarray(video.transpose(0, 3, 1, 2)),
        [Image.fromarray(frame) for frame in video],
        video.astype(np.float64) / 255,
    ]
    for form in forms:
        assert opened(form, share=0.8).ask(STAR, max_new_tokens=6).token_ids == want


def test_statistics_add_up(opened, video_model):
    answer = opened(theta=2.0, share=0.7).ask(MOON, max_new_tokens=10)
    stats = answer.stats
    assert stats.new_tokens == len(answer.token_ids) == 10
    assert stats.visual_tokens == 240
    token_bytes = 4 * 4 * 2 * 32 * 4
    assert stats.kv_full_bytes == (stats.prompt_tokens + 10) * token_bytes
    assert 0 < stats.kv_device_peak_bytes <= stats.kv_cap_bytes < stats.kv_full_bytes
    assert stats.kv_host_bytes >= stats.prompt_tokens * token_bytes // 4  # 8 bits instead of float32
    assert (stats.static_heads, stats.dynamic_heads) == (0, 16)
    assert 0 <= stats.hit_rate <= 1
    assert stats.moved_bytes > stats.prefetched_bytes == 0
    assert 0 < stats.unseen_mass < 1
    assert stats.ttft_s > 0
    assert stats.tpot_ms > 0


def test_a_trace_records_every_selection(opened):
    answer = opened(theta=2.0).ask(MOON, max_new_tokens=6, trace=True)
    assert {(s.step, s.layer) for s in answer.trace} == {(step, layer) for step in range(1, 6) for layer in range(4)}
    assert sum(int((s.first_token >= 0).sum()) for s in answer.trace) == answer.stats.selected_chunks
    assert all(int(s.first_token.max()) < answer.stats.prompt_tokens for s in answer.trace)
    assert opened().ask(MOON, max_new_tokens=2).trace is None


def test_generate_is_a_session_with_one_question(opened, video_model, processor, frames):
    options = {**pressed(video_model, 280, 0.6), **TIGHT, "processor": processor, "fps": 4}
    one = tieredkv.generate(video_model, frames, STAR, **tier_options(**options), max_new_tokens=6)
    assert one.token_ids == opened().ask(STAR, max_new_tokens=6).token_ids


def test_a_budget_too_small_is_refused_before_prefill_naming_one_that_works(video_model, processor, frames):
    ask = {"processor": processor, "fps": 4, "max_new_tokens": 4}
    with pytest.raises(BudgetError, match="the smallest that works is") as refused:
        tieredkv.generate(video_model, frames, STAR, 1e-7, **ask)
    works = float(str(refused.value).split("works is ")[1].split(". ")[0])
    answer = tieredkv.generate(video_model, frames, STAR, works, **ask)
    assert answer.stats.kv_device_peak_bytes <= answer.stats.kv_cap_bytes


def test_a_refused_question_leaves_the_session_usable(opened):
    session = opened()
    want = session.ask(STAR, max_new_tokens=4).token_ids
    with pytest.raises(BudgetError):
        session.ask(STAR, max_new_tokens=100_000)
    with pytest.raises(PromptError):
        session.ask(" ")
    with pytest.raises(tieredkv.OptionError):
        session.ask(STAR, temprature=1)
    assert session.ask(STAR, max_new_tokens=4).token_ids == want


def test_a_streamer_that_fails_leaves_the_session_usable(opened):
    class Failing:
        def put(self, value):
            raise RuntimeError("the reader went away")

        def end(self):
            pass

    session = opened()
    want = session.ask(STAR, max_new_tokens=4).token_ids
    with pytest.raises(RuntimeError, match="went away"):
        session.ask(STAR, max_new_tokens=4, streamer=Failing())
    assert session.ask(STAR, max_new_tokens=4).token_ids == want


def test_a_closed_session_frees_its_memory_and_refuses_work(opened):
    session = opened()
    cache, threads = session._cached.cache, threading.active_count()
    session.close()
    session.close()
    assert cache.host_bytes == 0
    assert cache.ledger.used_bytes == 0
    assert threading.active_count() <= threads
    with pytest.raises(TieredKVError, match="closed"):
        session.ask(STAR)


def test_a_second_video_needs_a_second_session(opened, frames):
    with pytest.raises(TieredKVError, match="open another session"):
        opened().ingest(frames)


def test_the_placeholder_in_a_prompt_is_refused(opened):
    with pytest.raises(PromptError, match="stands for the video"):
        opened().ask("what is <|video_pad|> ?")


def test_a_streamer_is_ended_when_the_question_is_refused(opened):
    class Reader:
        ended = False

        def put(self, value):
            pass

        def end(self):
            self.ended = True

    for options, error in (({"max_new_tokens": 100_000}, BudgetError), ({"temprature": 1}, tieredkv.OptionError)):
        reader = Reader()
        with pytest.raises(error):
            opened().ask(STAR, streamer=reader, **options)
        assert reader.ended
    reader = Reader()
    with pytest.raises(tieredkv.VideoError):
        tieredkv.generate("nowhere", "gone.mp4", STAR, streamer=reader)
    assert reader.ended


def test_a_failing_copy_reaches_the_caller_and_leaves_the_session_usable(opened, monkeypatch):
    session = opened(theta=2.0, reuse_above=-1.0)
    want = session.ask(MOON, max_new_tokens=6).token_ids
    prefetcher = session._cached.cache.device_tier.copies

    def fail() -> int:
        raise OSError("the copy failed")

    with monkeypatch.context() as patch:
        patch.setattr(prefetcher, "submit", lambda key, copy, submit=prefetcher.submit: submit(key, fail))
        with pytest.raises(OSError, match="the copy failed"):
            session.ask(MOON, max_new_tokens=6)
    assert session.ask(MOON, max_new_tokens=6).token_ids == want
    assert session._cached.cache.ledger.used_bytes == 0


def test_an_interrupt_in_the_middle_of_decoding_leaves_the_session_usable(opened, video_model, monkeypatch):
    session = opened()
    want = session.ask(STAR, max_new_tokens=5).token_ids
    layer, calls = video_model.model.language_model.layers[2].mlp, []

    def interrupted(x, forward=layer.forward):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(x)

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.ask(STAR, max_new_tokens=5)
    assert session.ask(STAR, max_new_tokens=5).token_ids == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "mine"}, "positions='mine' is not valid"),
        ({"processor": object()}, "processor is a object without video_processor"),
        ({"gpu_gb": 3}, "'gpu_gb' is not an option"),
        ({"temperature": 1.0}, "is a generation option: give it to ask"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_options_of_a_session_are_refused(video_model, processor, frames, options, message):
    with pytest.raises(TieredKVError, match=message):
        tieredkv.open_session(video_model, frames, **{"processor": processor, "fps": 4, **options})


def test_frames_the_processor_refuses_are_a_video_error(video_model, processor):
    sliver = np.zeros((4, 1, 300, 3), np.uint8)
    with pytest.raises(tieredkv.VideoError, match="refuses frames of 300x1"):
        tieredkv.open_session(video_model, sliver, processor=processor, fps=4)


@pytest.mark.parametrize("prefill_chunk", [4096, 23])
def test_a_conversation_has_the_logits_of_stock_transformers(video_model, processor, frames, prefill_chunk):
    with tieredkv.open_session(
        video_model,
        frames,
        gpu_kv_gb=1,
        processor=processor,
        fps=4,
        positions="stock",
        prefill_chunk=prefill_chunk,
    ) as session:
        turns = []
        for question in (STAR, MOON, STAR):
            record = RecordLogits()
            answer = session.chat(question, max_new_tokens=6, do_sample=False, logits_processor=[record])
            inputs = stock_inputs(processor, frames, question, earlier=turns)
            stock = stock_logits(video_model, inputs, 6)
            assert_near(torch.cat(record.seen), stock)
            turns.append((question, answer.text))
        assert session.history == tuple(turns)


def test_a_conversation_does_not_prefill_the_video_again(opened, monkeypatch):
    from tieredkv.models.families.qwen2_5_vl import Qwen25VL

    session, decoded = opened(), []
    decode = Qwen25VL.decode
    monkeypatch.setattr(
        Qwen25VL, "decode", lambda self, model, e, *rest: decoded.append(e.shape[1]) or decode(self, model, e, *rest)
    )
    for _ in range(3):
        session.chat(STAR, max_new_tokens=4)
    assert sum(decoded) < session.video.tokens


def test_asking_neither_sees_nor_disturbs_the_conversation(opened):
    session, other = opened(), opened()
    alone = other.ask(MOON, max_new_tokens=6).token_ids
    session.chat(STAR, max_new_tokens=4)
    assert session.ask(MOON, max_new_tokens=6).token_ids == alone
    after = session.chat(MOON, max_new_tokens=6).token_ids
    other.chat(STAR, max_new_tokens=4)
    assert other.chat(MOON, max_new_tokens=6).token_ids == after


def test_a_turn_that_fails_is_forgotten(opened):
    session = opened()
    session.chat(STAR, max_new_tokens=2)
    with pytest.raises(PromptError):
        session.chat("  ")
    with pytest.raises(BudgetError):
        session.chat(MOON, max_new_tokens=100_000)
    assert len(session.history) == 1
    session.clear_history()
    assert session.chat(MOON, max_new_tokens=4).token_ids == session.ask(MOON, max_new_tokens=4).token_ids


def test_questions_from_several_threads_take_turns(opened):
    session = opened()
    expected = {question: session.ask(question, max_new_tokens=6).token_ids for question in (STAR, MOON)}
    got = []

    def work(question):
        for _ in range(3):
            got.append((question, session.ask(question, max_new_tokens=6).token_ids))

    threads = [threading.Thread(target=work, args=(question,)) for question in (STAR, MOON)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 6
    assert all(expected[question] == ids for question, ids in got)


def test_host_memory_stays_under_its_cap_when_a_long_question_grows_it(opened, video_model):
    from tieredkv.memory.units import GIB

    cap = cap_share(video_model, 700, 1)
    session = opened(share=3, host_kv_gb=cap)
    with pytest.raises(BudgetError, match=r"host_kv_gb allows .*: shorten the question or the conversation"):
        session.ask(" ".join([STAR] * 90), max_new_tokens=2)
    assert session.ask(" ".join([STAR] * 55), max_new_tokens=2).stats.kv_host_bytes <= cap * GIB


def test_a_question_too_long_for_the_device_is_refused_with_advice(opened):
    with pytest.raises(BudgetError, match="shorten the question or the conversation"):
        opened(share=0.5).ask(" ".join([STAR] * 200), max_new_tokens=2)


@pytest.mark.parametrize("prefill_chunk", [1, 3])
def test_the_smallest_cap_named_is_enough_however_short_the_prefill_calls(
    video_model, processor, frames, prefill_chunk
):
    options = {"processor": processor, "fps": 4, "prefill_chunk": prefill_chunk, "chunk_tokens": 32}
    with pytest.raises(BudgetError, match="the smallest that works is") as refused:
        tieredkv.generate(video_model, frames[:40], STAR, gpu_kv_gb=1e-6, max_new_tokens=3, **options)
    named = float(str(refused.value).partition("works is ")[2].split(". ")[0])
    assert tieredkv.generate(video_model, frames[:40], STAR, gpu_kv_gb=named, max_new_tokens=3, **options).token_ids


def test_a_cap_given_twice_is_refused(video_model, processor, frames):
    from tieredkv.errors import OptionError

    with pytest.raises(OptionError, match="give either tiers or gpu_kv_gb, not both"):
        tieredkv.open_session(
            video_model, frames, gpu_kv_gb=1, tiers=tieredkv.TierConfig(gpu_kv_gb=2), processor=processor
        )


@pytest.mark.parametrize("prompt", [5, None, ["what ?"]])
def test_a_prompt_that_is_not_text_is_refused(opened, prompt):
    with pytest.raises(PromptError, match="give the question as text"):
        opened().ask(prompt)
