"""Chat templates, tokenizers and questions that cannot be used: one sentence each, before anything is decoded."""

from __future__ import annotations

import copy

import pytest
from families import build

import tieredkv
from tieredkv.errors import PromptError, TieredKVError, UnsupportedModelError
from tieredkv.models.chat_template import ChatTemplate
from tieredkv.models.families import VIDEO_FAMILIES
from tieredkv.models.prompts import check_prompt
from tieredkv.tiny.processor import CHAT_TEMPLATE

TURNS = [("what is it ?", None)]


@pytest.fixture
def own():
    """A processor that a test may change."""
    return copy.deepcopy(build("qwen2_5_vl")[1])


def around(processor, turns=TURNS):
    return ChatTemplate(VIDEO_FAMILIES["qwen2_5_vl"], processor).around_video(turns)


def test_a_missing_chat_template_is_an_error_that_says_what_to_do(own, frames):
    own.chat_template = own.tokenizer.chat_template = None
    with pytest.raises(UnsupportedModelError, match=r"has no chat template: copy chat_template\.jinja"):
        tieredkv.open_session(build("qwen2_5_vl")[0], frames, processor=own, fps=4)
    with pytest.raises(UnsupportedModelError, match="has no chat template"):
        tieredkv.plan(build("qwen2_5_vl")[0], frames, processor=own, fps=4)


def test_the_tokenizers_chat_template_is_used_where_the_processor_has_none(own):
    expected = around(own)
    own.tokenizer.chat_template, own.chat_template = own.chat_template, None
    assert around(own) == expected


@pytest.mark.parametrize("form", ["a dict", "a list"])
def test_of_several_templates_the_one_named_default_is_used(own, form):
    expected = around(own)
    named = {"default": own.chat_template, "tools": "{{ raise_exception('no') }}"}
    own.chat_template = (
        named if form == "a dict" else [{"name": name, "template": text} for name, text in named.items()]
    )
    assert around(own) == expected


def placed(text: str) -> str:
    """A template that writes a turn in another way."""
    video = "<|vision_start|><|video_pad|><|vision_end|>"
    return text.replace("VIDEO", video)


UNUSABLE = {
    "that raises": ("{{ raise_exception('roles must alternate') }}", r"fails \(roles must alternate\)"),
    "that is no jinja": ("{% for %}", "chat template fails"),
    "that fails in Python": ("{{ messages[7]['content'] + 1 }}", "chat template fails"),
    "without the video": ("{{ messages[-1]['content'][-1]['text'] }}", "writes no placeholder for the video"),
    "without the question": (placed("VIDEO{{ messages | length }}"), "leaves the question out"),
    "with two videos": (placed("VIDEO VIDEO {{ messages[-1]['content'][-1]['text'] }}"), "a second time"),
    "without a default": ({"tools": CHAT_TEMPLATE}, "are named tools, and none 'default'"),
    "that is a number": (3, "is a int: give it as text"),
}


@pytest.mark.parametrize(("template", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_template_is_refused(own, template, message):
    own.chat_template = template
    with pytest.raises(UnsupportedModelError, match=message) as refusal:
        around(own)
    assert "\n" not in str(refusal.value)


def test_a_template_that_omits_later_turns_is_refused_when_there_are_some(own):
    own.chat_template = placed("VIDEO{{ messages[0]['content'][-1]['text'] }}")
    around(own)
    with pytest.raises(UnsupportedModelError, match="leaves the question out"):
        around(own, [("one ?", "yes"), ("two ?", None)])


def test_a_template_that_repeats_or_changes_the_question_is_used(own):
    question = "{{ messages[-1]['content'][-1]['text'] | upper }}"
    own.chat_template = placed(f"VIDEO{question} {question}")
    assert around(own)[1].count("WHAT IS IT ?") == 2


def test_a_question_before_the_video_is_refused_before_anything_is_decoded(own, frames):
    own.chat_template = placed("{{ messages[-1]['content'][-1]['text'] }}VIDEO")
    with pytest.raises(PromptError, match="puts the prompt before the video"):
        tieredkv.open_session(build("qwen2_5_vl")[0], frames[:4], processor=own, fps=4, gpu_kv_gb=1)


def test_a_template_may_write_the_time_before_the_video(own, frames):
    """The date of a system prompt stays what it was when the video was read."""
    own.chat_template = placed("{{ strftime_now('%H %M %S %f') }}VIDEO{{ messages[-1]['content'][-1]['text'] }}")
    options = {"processor": own, "fps": 4, "gpu_kv_gb": 1}
    with tieredkv.open_session(build("qwen2_5_vl")[0], frames[:4], **options) as session:
        first, second = (session.ask("what is it ?", max_new_tokens=3).token_ids for _ in range(2))
    assert first == second


def test_a_session_keeps_the_template_it_was_opened_with(own, frames):
    options = {"processor": own, "fps": 4, "gpu_kv_gb": 1}
    with tieredkv.open_session(build("qwen2_5_vl")[0], frames[:4], **options) as session:
        want = session.ask("what is it ?", max_new_tokens=3).token_ids
        own.chat_template = placed("other words VIDEO{{ messages[-1]['content'][-1]['text'] }}")
        assert session.ask("what is it ?", max_new_tokens=3).token_ids == want


def test_a_tokenizer_that_does_not_know_the_video_is_refused(own):
    own.video_token = "<no such token>"
    with pytest.raises(UnsupportedModelError, match="the tokenizer does not know '<no such token>'"):
        around(own)


def test_an_error_of_the_tokenizer_is_a_prompt_error(own):
    def tokenizer(*args, **options):
        raise Exception("WordLevel error: Missing [UNK] token\nfrom the vocabulary")

    template = ChatTemplate(VIDEO_FAMILIES["qwen2_5_vl"], own)
    own.tokenizer = tokenizer
    with pytest.raises(
        PromptError, match=r"the tokenizer refuses the prompt, .* \(WordLevel error: Missing \[UNK\] token\)"
    ):
        template.tokenize("what")


HALVES = {
    "half a pair": ("the moon \ud83d", "half a character ('\\ud83d' at position 10)"),
    "a pair in two halves": ("\ud83d\ude00", "half a character ('\\ud83d' at position 1)"),
    "a byte that is no text": ("caf\udce9", "half a character ('\\udce9' at position 4)"),
    "a null": ("what\0", "a null character"),
}


@pytest.mark.parametrize(("prompt", "message"), HALVES.values(), ids=HALVES)
def test_text_that_no_tokenizer_reads_is_refused(prompt, message):
    with pytest.raises(PromptError) as refusal:
        check_prompt(prompt)
    assert f"the prompt contains {message}" in str(refusal.value)
    str(refusal.value).encode()  # the message can be printed


@pytest.mark.parametrize("prompt", ["\U0001f600 ?", "\u200b", "\ufeffwhat", "\U0010ffff", "a" * 100_000])
def test_odd_text_is_no_error(prompt):
    check_prompt(prompt)


async def test_every_way_to_ask_refuses_half_a_character_and_leaves_history_unchanged(video_model, processor, frames):
    half, options = "the moon \ud83d", {"max_new_tokens": 2}
    with tieredkv.open_session(video_model, frames[:8], processor=processor, fps=4, gpu_kv_gb=1) as session:
        session.chat("what is it ?", **options)
        for call in (session.ask, session.chat, session.aask, session.achat):
            for stream in (False, True):
                with pytest.raises(PromptError, match="half a character"):
                    call(half, stream=stream, **options)
        for call in (tieredkv.generate, tieredkv.agenerate):
            with pytest.raises(PromptError, match="half a character"):
                call(video_model, frames[:8], half, processor=processor)
        assert [question for question, _ in session.history] == ["what is it ?"]
        session.chat("and then ?", **options)


@pytest.mark.parametrize("name", ["half \ud83d.tkv", "null \0.tkv"])
def test_a_session_is_not_saved_under_an_invalid_file_name(video_model, processor, frames, tmp_path, name):
    with tieredkv.open_session(video_model, frames[:8], processor=processor, fps=4, gpu_kv_gb=1) as session:
        with pytest.raises(TieredKVError, match="is not a file name") as refusal:
            session.save(tmp_path / name)
        str(refusal.value).encode()
        assert list(tmp_path.iterdir()) == []
        session.save(tmp_path / "byte \udce9.tkv")  # Linux allows it
    tieredkv.load_session(tmp_path / "byte \udce9.tkv", video_model, processor=processor).close()
