"""Generation options are transformers' own: same names, same effect, unknown ones refused."""

from __future__ import annotations

import pytest
import torch
from helpers import stock_inputs
from transformers import GenerationConfig, StoppingCriteria

import tieredkv
from tieredkv.decode import check_options, resolve_stop_strings
from tieredkv.errors import OptionError

QUESTION = "what colour was the star ?"


@pytest.fixture(scope="module")
def session(video_model, processor, frames):
    with tieredkv.open_session(
        video_model, frames, gpu_kv_gb=1, processor=processor, fps=4, positions="stock"
    ) as opened:
        yield opened


@pytest.fixture(scope="module")
def stock(video_model, processor, frames):
    inputs = stock_inputs(processor, frames, QUESTION)

    def generate(**options):
        ids = video_model.generate(**inputs, **options)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

    return generate


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[27]]},
        {"suppress_tokens": [16, 24, 42]},
        {"min_new_tokens": 5, "eos_token_id": 16},
        {"eos_token_id": 27},
    ],
    ids=str,
)
def test_greedy_options_do_what_stock_generate_does(session, stock, options):
    options = {"max_new_tokens": 10, "do_sample": False, **options}
    assert session.ask(QUESTION, **options).token_ids == stock(**options)


@pytest.mark.parametrize("options", [{"temperature": 1.7}, {"top_p": 0.7}, {"top_k": 3}, {"min_p": 0.1}], ids=str)
def test_sampling_draws_what_stock_generate_draws(session, stock, options):
    options = {"max_new_tokens": 10, "do_sample": True, **options}
    torch.manual_seed(3)
    ours = session.ask(QUESTION, **options).token_ids
    torch.manual_seed(3)
    assert ours == stock(**options)


def test_a_generation_config_is_taken(session, stock):
    config = GenerationConfig(max_new_tokens=7, repetition_penalty=1.5, do_sample=False)
    assert session.ask(QUESTION, generation_config=config).token_ids == stock(generation_config=config)


@pytest.mark.parametrize("where", ["option", "generation_config"])
def test_stop_strings_become_a_stopping_criterion(byte_tokenizer, where):
    config = GenerationConfig(stop_strings=["lo"])
    options = {"stop_strings": ["lo"]} if where == "option" else {"generation_config": config}
    resolve_stop_strings(options, byte_tokenizer)
    (criterion,) = options["stopping_criteria"]
    verdicts = [bool(criterion(byte_tokenizer(text, return_tensors="pt").input_ids, None)) for text in ("hel", "hello")]
    assert verdicts == [False, True]
    assert "stop_strings" not in options
    assert config.stop_strings == ["lo"], "the caller's config was changed"


def test_stopping_criteria_end_the_answer(session):
    class AfterThree(StoppingCriteria):
        def __init__(self):
            self.calls = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.calls += 1
            return torch.full((input_ids.shape[0],), self.calls >= 3)

    assert session.ask(QUESTION, max_new_tokens=10, stopping_criteria=[AfterThree()]).stats.new_tokens == 3


def test_a_streamer_gets_every_token_and_the_end(session):
    class Keeping:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    streamer = Keeping()
    answer = session.ask(QUESTION, max_new_tokens=6, streamer=streamer)
    assert streamer.ended
    assert [token for part in streamer.tokens[1:] for token in part] == answer.token_ids


def test_a_misspelt_option_is_refused_with_the_name_meant():
    with pytest.raises(OptionError, match=r"'temprature' is not an option\. Did you mean temperature\?"):
        check_options({"temprature": 0.5})


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"num_return_sequences": 2}, {"use_cache": False}], ids=str)
def test_options_that_change_what_decoding_is_are_refused(options):
    with pytest.raises(OptionError, match="is not supported"):
        check_options(options)


def test_what_a_generation_config_asks_for_is_looked_into(session):
    for config, message in (
        (GenerationConfig(num_beams=3), "num_beams=3"),
        (GenerationConfig(penalty_alpha=0.6, top_k=4), "penalty_alpha=0.6"),
        (GenerationConfig(max_length=5), "max_length=5"),
        ({"max_new_tokens": 3}, "generation_config is a dict"),
    ):
        with pytest.raises(OptionError, match=message):
            session.ask(QUESTION, generation_config=config)


def test_a_value_transformers_refuses_is_an_option_error(session):
    with pytest.raises(OptionError, match="temperature"):
        session.ask(QUESTION, max_new_tokens=3, do_sample=True, temperature=-1.0)


def test_the_models_own_length_holds_when_none_is_given(session, video_model):
    assert session.new_tokens({}) == video_model.generation_config.max_new_tokens == 32


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True])
def test_a_silly_length_is_refused(value):
    with pytest.raises(OptionError, match="max_new_tokens"):
        check_options({"max_new_tokens": value})


def test_an_unknown_option_of_generate_is_refused_before_anything_is_loaded():
    with pytest.raises(OptionError, match="Did you mean max_frames"):
        tieredkv.generate("/nowhere", "nothing.mp4", "what ?", max_frame=3)
