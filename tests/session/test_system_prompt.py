"""A system prompt: part of a session, written as transformers writes it, or refused by name."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from command_line import run
from families import BUILD, build
from helpers import RecordLogits, assert_near, session_logits, stock_inputs, stock_logits

import tieredkv
from tieredkv.api import new_session
from tieredkv.errors import OptionError, PromptError, SessionError, UnsupportedModelError

BRIEF, QUESTION = "Answer in one word.", "what is it ?"
DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
"""The beginning of Qwen's templates: a system prompt of their own where none is given."""
OPTIONS = {"gpu_kv_gb": 1, "fps": 4}


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, (7, 60, 90, 3), dtype=np.uint8)


@pytest.fixture
def qwen():
    """Model and processor, which a test may change."""
    model, processor = build("qwen2_5_vl")
    return model, copy.deepcopy(processor)


class RecordIds(RecordLogits):
    """Keeps the prompt that a session gives to processors of logits."""

    def __call__(self, input_ids, scores):
        self.ids = getattr(self, "ids", input_ids)
        return super().__call__(input_ids, scores)


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("system", [None, BRIEF], ids=["the template's", "given"])
def test_prompts_and_logits_equal_stock(name, film, system):
    model, processor = build(name)
    processor = copy.copy(processor)
    if processor.chat_template:  # SmolVLM's processor brings one of its own
        processor.chat_template = DEFAULT + processor.chat_template
    theirs = stock_inputs(processor, film, QUESTION, system=system)
    options = {"processor": processor, "positions": "stock", "system": system, **OPTIONS}
    with tieredkv.open_session(model, film, **options) as session:
        record = RecordIds()
        session.ask(QUESTION, max_new_tokens=2, do_sample=False, logits_processor=[record])
        assert record.ids.tolist() == theirs["input_ids"].tolist()
        assert_near(record.seen[1], stock_logits(model, theirs, 2)[1:])
        head = processor.tokenizer.decode(session._ingested.head_ids)
    assert (BRIEF in head) == (system is not None)
    assert ("You are helpful." in head) == (system is None and processor.chat_template is not None)


def test_a_conversation_keeps_it(qwen, film):
    model, processor = qwen
    with tieredkv.open_session(model, film, processor=processor, system=BRIEF, positions="stock", **OPTIONS) as session:
        first = session.chat(QUESTION, max_new_tokens=3).text
        inputs = stock_inputs(processor, film, "and that ?", earlier=[(QUESTION, first)], system=BRIEF)
        stock = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert session.chat("and that ?", max_new_tokens=3).token_ids == stock.tolist()


def test_a_saved_session_keeps_it_and_refuses_another(qwen, film, tmp_path):
    model, processor = qwen
    path = tmp_path / "film.tkv"
    with tieredkv.open_session(model, film, processor=processor, system=BRIEF, **OPTIONS) as session:
        session.ask(QUESTION, max_new_tokens=1)
        expected = session_logits(session, QUESTION, 2)
        session.save(path)
    for given in (None, BRIEF):
        with tieredkv.load_session(path, model, processor=processor, system=given) as session:
            assert_near(session_logits(session, QUESTION, 2), expected)
            session.save(path)
    with pytest.raises(
        SessionError, match=r"with the system prompt .Answer in one word\..*, and .Be kind\.. was given"
    ):
        tieredkv.load_session(path, model, processor=processor, system="Be kind.")


def test_a_session_saved_without_one_refuses_any(qwen, film, tmp_path):
    model, processor = qwen
    with tieredkv.open_session(model, film, processor=processor, **OPTIONS) as session:
        session.save(tmp_path / "film.tkv")
    with pytest.raises(SessionError, match=r"was saved without a system prompt, and .Answer in one word\.. was given"):
        tieredkv.load_session(tmp_path / "film.tkv", model, processor=processor, system=BRIEF)


def test_a_plan_counts_it(qwen, film):
    model, processor = qwen
    plans = [tieredkv.plan(model, film, processor=processor, system=s, **OPTIONS) for s in (None, BRIEF)]
    with tieredkv.open_session(model, film, processor=processor, system=BRIEF, **OPTIONS) as session:
        assert plans[1].prompt_tokens == session.head_tokens + session.video.tokens + 64 > plans[0].prompt_tokens
    counted = [tieredkv.plan(model, 99, processor=processor, system=s, gpu_kv_gb=1) for s in (None, BRIEF)]
    assert counted[1].prompt_tokens > counted[0].prompt_tokens


def test_a_plan_of_a_text_model_refuses_it(llama):
    with pytest.raises(OptionError, match="system= is for models that take video"):
        tieredkv.plan(llama.config, 1000, gpu_kv_gb=1, system=BRIEF)


def test_a_template_that_takes_it_as_text_gets_it_as_text(qwen, film):
    model, processor = qwen
    written = (
        "{% if messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    )
    rest = processor.chat_template.replace("in messages", "in messages if message['role'] != 'system'")
    processor.chat_template = written + rest
    with tieredkv.open_session(model, film, processor=processor, system=BRIEF, **OPTIONS) as session:
        head = processor.tokenizer.decode(session._ingested.head_ids)
    assert head.startswith(f"<|im_start|>system\n{BRIEF}<|im_end|>\n<|im_start|>user")


UNUSABLE = {
    "that leaves it out": (
        "{% for part in messages[-1]['content'] %}{{ part.get('text', VIDEO) }}{% endfor %}",
        "chat template of this Qwen2_5_VLProcessor does not write the system prompt: leave system= out",
    ),
    "that writes it after the video": (
        "{{ VIDEO }}{{ messages[0]['content'][-1]['text'] }}{{ messages[-1]['content'][-1]['text'] }}",
        "chat template of this Qwen2_5_VLProcessor writes the system prompt after the video",
    ),
    "that takes none": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}",
        "no s",
    ),
}


@pytest.mark.parametrize(("template", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_template_is_refused(qwen, film, template, message):
    model, processor = qwen
    processor.chat_template = template.replace("VIDEO", "'<|vision_start|><|video_pad|><|vision_end|>'")
    with pytest.raises(UnsupportedModelError, match=message):
        tieredkv.open_session(model, film, processor=processor, system=BRIEF, **OPTIONS)


BAD = {
    "is empty: leave it out": "  ",
    "is of type int: give it as text": 3,
    "contains '<|video_pad|>'": "see <|video_pad|>",
    "contains half a character": "\ud83d",
}


@pytest.mark.parametrize(("message", "system"), BAD.items(), ids=BAD)
def test_a_system_prompt_that_cannot_be_used_is_refused(qwen, film, message, system):
    model, processor = qwen
    with pytest.raises(PromptError) as refusal:
        tieredkv.open_session(model, film, processor=processor, system=system, **OPTIONS)
    assert f"the system prompt {message}" in str(refusal.value)


def test_it_is_refused_before_a_model_is_loaded(film):
    for call in (
        lambda: new_session("/nowhere", system=" "),
        lambda: tieredkv.generate("/nowhere", film, QUESTION, system=" "),
    ):
        with pytest.raises(PromptError, match="the system prompt is empty"):
            call()


@pytest.mark.model
def test_the_command_line_saves_it_with_the_session(monkeypatch, capsys, short_video, tmp_path):
    session = ["--session", str(tmp_path / "film.tkv")]
    question = "what colour was the star ?"
    code, out, _ = run(monkeypatch, capsys, "ask", str(short_video), question, "--system", BRIEF, *session)
    assert code == 0
    assert run(monkeypatch, capsys, "ask", question, "--system", BRIEF, *session)[:2] == (0, out)
    code, out, err = run(monkeypatch, capsys, "ask", question, "--system", "Be kind.", *session)
    assert (code, out) == (2, "")
    assert "'Answer in one word.', and 'Be kind.' was given" in err
