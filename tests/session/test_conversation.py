"""Conversations: what the next turn reads, and that its answer does not depend on what was kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import build
from helpers import RecordLogits, assert_near, session_logits, stock_inputs, stock_logits

import tieredkv
from tieredkv.errors import TieredKVError
from tieredkv.memory.units import GIB
from tieredkv.planning import sizes
from tieredkv.session import question

TURNS = ("what is it ?", "and who is that , over there ?", "why ?")
OPTIONS = {"gpu_kv_gb": 1, "fps": 4, "positions": "stock"}


@pytest.fixture(scope="module")
def film():
    return np.random.default_rng(2).integers(0, 256, (23, 60, 90, 3), dtype=np.uint8)


ROLE, THINK = "<end_of_utterance>", "<global-img>"
"""Written after a role, and where thinking begins: tokens that merge with no answer's first letters."""


@pytest.fixture(params=["qwen2_5_vl", "qwen3_5"], ids=["full attention", "linear attention"])
def parts(request, monkeypatch):
    """Model and processor."""
    model, processor = build(request.param)
    model.generation_config.eos_token_id = None
    template = processor.chat_template.replace("}}\n{% for", f"}}}}{ROLE}{{% for")
    template = template.replace("assistant\n", f"assistant{ROLE}")
    assert template.count(ROLE) == 2
    monkeypatch.setattr(processor, "chat_template", template)
    return model, processor


@pytest.fixture
def thinking(parts, monkeypatch):
    """A template that opens the thinking of the answer to come, and leaves that mark out of the answers before."""
    processor = parts[1]
    template = processor.chat_template.replace(f"assistant{ROLE}", f"assistant{ROLE}{THINK}")
    monkeypatch.setattr(processor, "chat_template", template)


@pytest.fixture
def opened(parts, film):
    model, processor = parts
    with tieredkv.open_session(model, film, processor=processor, **OPTIONS) as session:
        yield session


class Reads:
    """Counts the prompt tokens that a model is given in calls of several."""

    def __init__(self, model):
        self.calls: list[int] = []
        self.hook = model.get_decoder().register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, args, options):
        if (tokens := options["inputs_embeds"].shape[1]) > 1:
            self.calls.append(tokens)

    def take(self):
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def reads(parts):
    counted = Reads(parts[0])
    yield counted
    counted.hook.remove()


def turn(session, text, new=6):
    """Logits of a turn, and its answer."""
    record = RecordLogits()
    answer = session.chat(text, max_new_tokens=new, do_sample=False, logits_processor=[record])
    return torch.cat(record.seen), answer


def check_stock(session, parts, film, between=lambda: None):
    """Every turn of a conversation has the logits of stock transformers; yields prompt lengths."""
    model, processor = parts
    for text in TURNS:
        between()
        inputs = stock_inputs(processor, film, text, earlier=session.history)
        logits, answer = turn(session, text)
        assert_near(logits, stock_logits(model, inputs, 6))
        yield answer.stats.prompt_tokens


# ---- what is read


def test_a_turn_reads_the_last_answer_and_its_question(opened, reads, parts, film):
    before = None
    for prompt in check_stock(opened, parts, film):
        kept = opened._conversation.kept
        assert kept.passage.stop == prompt
        ours = reads.take()  # stock's own call is the second
        if before is not None:
            assert prompt - before in ours
            assert ours == [prompt - before, prompt]
        before = prompt


def test_questions_in_between_change_neither_what_is_read_nor_the_answer(opened, reads, parts, film):
    want = session_logits(opened, TURNS[1], 4)
    before = None

    def ask():
        assert torch.equal(session_logits(opened, TURNS[1], 4), want)
        reads.take()

    for prompt in check_stock(opened, parts, film, between=ask):
        assert before is None or reads.take()[0] == prompt - before
        before = prompt


def test_short_conversations_are_read_again_where_the_template_changes_earlier_answers(
    thinking, opened, reads, parts, film
):
    for prompt in check_stock(opened, parts, film):
        after = prompt - opened.head_tokens - opened.video.tokens
        if parts[0].config.model_type == "qwen3_5":
            assert reads.take()[0] == after
            assert opened._conversation.kept is None


def test_long_conversations_are_kept_up_to_the_question(thinking, opened, reads, parts, film, monkeypatch):
    monkeypatch.setattr(question, "WORTH_A_CALL", 1)
    kept = opened.head_tokens + opened.video.tokens
    for prompt in check_stock(opened, parts, film):
        calls = reads.take()[:-1]  # the last is stock's
        assert sum(calls) == prompt - kept
        if parts[0].config.model_type == "qwen3_5":
            assert len(calls) == (1 if len(opened.history) == 1 else 2)
            kept = opened._conversation.kept.passage.stop if opened._conversation.kept else kept
        else:  # to where the prompts differ
            kept = prompt - 1


def test_a_conversation_longer_than_a_call_is_kept_too(parts, film, reads, thinking, monkeypatch):
    monkeypatch.setattr(question, "WORTH_A_CALL", 1)
    model, processor = parts
    with tieredkv.open_session(model, film, processor=processor, prefill_chunk=7, **OPTIONS) as session:
        for _ in check_stock(session, parts, film):
            pass
        assert max(reads.take()[:-1]) > 7  # stock's
        assert session._conversation.kept is not None


@pytest.mark.parametrize("forget", [False, True], ids=["kept", "read again"])
def test_heads_are_classified_by_the_rows_of_the_new_question(opened, monkeypatch, forget):
    scored = []
    collect = question.collect_evidence

    def watch(cached, looks, *rest):
        scored.append(len(looks.question))
        return collect(cached, looks, *rest)

    monkeypatch.setattr(question, "collect_evidence", watch)
    for text in TURNS:
        if forget:
            opened._conversation.kept = None
        turn(opened, text, 2)
    template = opened.template
    own = [len(template.tokenize(f"{text}<|im_end|>\n<|im_start|>assistant{ROLE}")[0]) for text in TURNS]
    assert scored[1:] == own[1:]


def test_a_template_of_one_turn_answers_the_first(opened, parts, monkeypatch):
    """Whether it can write a second is not asked before there is one."""
    refusal = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
    processor = parts[1]
    opened.template._source = refusal + processor.chat_template
    turn(opened, TURNS[0])
    with pytest.raises(TieredKVError, match="one turn"):
        opened.chat(TURNS[1])


# ---- other ways than one turn after another


def test_a_turn_that_is_stopped_leaves_what_was_kept(opened, reads):
    first = turn(opened, TURNS[0])[1].stats.prompt_tokens

    def stop(ids, scores):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened.chat(TURNS[2], logits_processor=[stop])
    reads.take()
    second = turn(opened, TURNS[1])[1].stats.prompt_tokens
    assert reads.take() == [second - first]


def test_a_saved_conversation_is_read_again_once(opened, parts, reads, film, tmp_path):
    model, processor = parts
    turn(opened, TURNS[0])
    opened.save(tmp_path / "talk.tkv")
    want = turn(opened, TURNS[1])[0]
    with tieredkv.load_session(tmp_path / "talk.tkv", model, processor=processor) as session:
        reads.take()
        assert_near(turn(session, TURNS[1])[0], want)
        assert reads.take()[0] == session._conversation.kept.passage.stop - session.head_tokens - session.video.tokens


def test_another_conversation_begins_anew(opened, reads):
    want = turn(opened, TURNS[0])[0]
    opened.clear_history()
    assert opened._conversation.nbytes == 0
    assert torch.equal(turn(opened, TURNS[0])[0], want)


def test_a_closed_session_keeps_nothing(opened):
    turn(opened, TURNS[0])
    assert opened._conversation.nbytes > 0
    opened.close()
    assert opened._conversation.nbytes == 0
    with pytest.raises(TieredKVError, match="closed"):
        opened.chat(TURNS[1])


# ---- host memory


def test_what_is_kept_counts_as_host_memory(opened):
    cache = opened._cached.cache
    stats = turn(opened, TURNS[0])[1].stats
    assert stats.kv_host_bytes == cache.host_bytes + opened._conversation.nbytes
    stats = opened.ask(TURNS[0], max_new_tokens=2).stats
    assert stats.kv_host_bytes == cache.host_bytes + opened._conversation.nbytes


def test_without_room_nothing_is_kept_and_answers_are_the_same(parts, film):
    model, processor = parts
    with tieredkv.open_session(model, film, processor=processor, **OPTIONS) as session:
        cache = session._cached.cache
        host = sizes.host_bytes(cache.shape, cache.tiers, cache.get_seq_length() + 64, 16) / GIB
    options = {**OPTIONS, "host_kv_gb": host}
    with tieredkv.open_session(model, film, processor=processor, **options) as session:
        list(check_stock(session, parts, film))
        assert session._conversation.kept is None


def test_a_longer_prompt_takes_the_room_of_what_is_kept(opened, monkeypatch):
    turn(opened, TURNS[0])
    kept = opened._conversation.nbytes
    long = " ".join([TURNS[1]] * 60)
    needed = []
    check = question.check_memory

    def watch(*args, **options):
        needed.append(options.get("beside", 0))
        if needed[-1]:
            raise tieredkv.BudgetError("no room")
        return check(*args, **options)

    monkeypatch.setattr(question, "check_memory", watch)
    opened.ask(long, max_new_tokens=2)
    assert needed == [kept, 0]
    assert opened._conversation.kept is None
