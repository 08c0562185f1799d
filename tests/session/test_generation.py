"""Generation options are transformers' own: same names, same effect, unknown ones refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from helpers import stock_inputs
from transformers import GenerationConfig, StoppingCriteria, StopStringCriteria, WatermarkingConfig

import tieredkv
from tieredkv.errors import OptionError
from tieredkv.session import generation
from tieredkv.session.generation import check_options, resolve_stop_strings
from tieredkv.session.generation_settings import FORMS, IDLE, SEARCHES, WORKS

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


@contextmanager
def own_settings(model, **settings) -> Iterator[None]:
    """Changes the model's own generation config inside the block."""
    before, config = model.generation_config, GenerationConfig(**model.generation_config.to_dict())
    for name, value in settings.items():
        setattr(config, name, value)
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


GREEDY = [
    {},
    {"repetition_penalty": 1.8},
    {"encoder_repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 1},
    {"bad_words_ids": [[27]]},
    {"suppress_tokens": [16, 24, 42]},
    {"begin_suppress_tokens": [16, 27, 42]},
    {"sequence_bias": [[[27], 40.0]]},
    {"forced_eos_token_id": 31},
    {"forced_bos_token_id": 31},
    {"exponential_decay_length_penalty": (2, 1.9), "eos_token_id": 31},
    {"watermarking_config": WatermarkingConfig(bias=5.0)},
    {"min_new_tokens": 5, "eos_token_id": 16},
    {"min_length": 10_000, "eos_token_id": 27},
    {"eos_token_id": 27},
    {"eos_token_id": [27, 16, 31], "pad_token_id": 3},
    {"renormalize_logits": True, "remove_invalid_values": True},
    {"temperature": 0.3, "top_p": 0.1, "top_k": 1},
]
"""Settings, with others under which they have an effect; the last have none without sampling."""


@pytest.mark.parametrize("options", GREEDY, ids=str)
def test_greedy_options_do_what_stock_generate_does(session, stock, options):
    options = {"max_new_tokens": 10, "do_sample": False, **options}
    assert session.ask(QUESTION, **options).token_ids == stock(**options)


SAMPLED = [
    {"temperature": 1.7},
    {"top_p": 0.7},
    {"top_k": 3},
    {"min_p": 0.1},
    {"top_h": 0.4},
    {"typical_p": 0.4},
    {"epsilon_cutoff": 0.05},
    {"eta_cutoff": 0.05},
]


def test_a_seed_draws_what_torch_would_draw_and_leaves_torchs_own_generator_alone(session, stock):
    options = {"max_new_tokens": 10, "do_sample": True, "temperature": 1.7}
    torch.manual_seed(3)
    expected = stock(**options)
    before = torch.get_rng_state()
    assert session.ask(QUESTION, seed=3, **options).token_ids == expected
    assert session.ask(QUESTION, seed=3, **options).token_ids == expected
    assert session.ask(QUESTION, seed=4, **options).token_ids != expected
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", SAMPLED, ids=str)
def test_sampling_draws_what_stock_generate_draws(session, stock, options):
    options = {"max_new_tokens": 10, "do_sample": True, **options}
    torch.manual_seed(3)
    ours = session.ask(QUESTION, **options).token_ids
    torch.manual_seed(3)
    assert ours == stock(**options)


@pytest.mark.parametrize("options", [*GREEDY, *({"do_sample": True, **more} for more in SAMPLED)], ids=str)
def test_the_models_own_settings_apply_as_in_stock_generate(session, stock, video_model, options):
    with own_settings(video_model, max_new_tokens=10, **options):
        torch.manual_seed(3)
        ours = session.ask(QUESTION).token_ids
        torch.manual_seed(3)
        assert ours == stock()


def test_the_callers_settings_take_precedence_over_the_models(session, stock, video_model):
    own = {"max_new_tokens": 10, "repetition_penalty": 1.8, "eos_token_id": 27}
    config = GenerationConfig(repetition_penalty=1.2, no_repeat_ngram_size=2)
    with own_settings(video_model, **own):
        assert session.ask(QUESTION, generation_config=config).token_ids == stock(generation_config=config)
        assert session.ask(QUESTION, repetition_penalty=1.0).token_ids == stock(repetition_penalty=1.0)
        assert session.ask(QUESTION, eos_token_id=None).token_ids == stock(eos_token_id=None)


def test_a_generation_config_is_accepted(session, stock):
    config = GenerationConfig(max_new_tokens=7, repetition_penalty=1.5, do_sample=False)
    assert session.ask(QUESTION, generation_config=config).token_ids == stock(generation_config=config)


@pytest.mark.parametrize("where", ["option", "generation_config", "model"])
def test_stop_strings_become_a_stopping_criterion(byte_tokenizer, where):
    config = GenerationConfig(stop_strings=["lo"])
    options = {"option": {"stop_strings": ["lo"]}, "generation_config": {"generation_config": config}, "model": {}}[
        where
    ]
    resolve_stop_strings(options, byte_tokenizer, config if where == "model" else None)
    (criterion,) = options["stopping_criteria"]
    verdicts = [bool(criterion(byte_tokenizer(text, return_tensors="pt").input_ids, None)) for text in ("hel", "hello")]
    assert verdicts == [False, True]
    assert "stop_strings" not in options
    assert config.stop_strings == ["lo"], "the config was changed"


@pytest.fixture
def spell(llama, byte_tokenizer):
    """Runs the loop on a model that always writes the same text."""
    text = byte_tokenizer("one two three four").input_ids

    def run(own=None, **options):
        place = iter(range(1, len(text)))

        def logits(at):
            return torch.nn.functional.one_hot(torch.tensor([text[at]]), 256).float()

        with own_settings(llama, **(own or {})):
            check_options(options, model_config=llama.generation_config)
            prompt = torch.tensor([[1, 2, 3]])
            decoded = generation.run(
                llama, prompt, logits(0), lambda _: logits(next(place)), len(text), options, byte_tokenizer
            )
        return byte_tokenizer.decode(decoded.token_ids)

    return run


@pytest.mark.parametrize(
    ("own", "options", "written"),
    [
        (None, {}, "one two three four"),
        ("two", {}, "one two"),
        (["three", "two"], {}, "one two"),
        (["two"], {"stop_strings": ["thr"]}, "one two thr"),
        (["two"], {"generation_config": GenerationConfig(stop_strings="three")}, "one two three"),
        (["two"], {"generation_config": GenerationConfig(top_k=3)}, "one two"),
        (["two"], {"stop_strings": None}, "one two three four"),
        (None, {"stop_strings": "wo", "generation_config": GenerationConfig(stop_strings="one")}, "one two"),
    ],
    ids=str,
)
def test_stop_strings_end_the_answer_wherever_they_are_written(spell, own, options, written):
    assert spell({"stop_strings": own}, **options) == written


def test_the_tokenizer_that_generate_needs_for_stop_strings_is_accepted(spell, byte_tokenizer):
    assert spell(stop_strings="two", tokenizer=byte_tokenizer) == "one two"


def test_stop_strings_that_transformers_cannot_find_in_a_vocabulary_are_found_in_the_text(session):
    whole = session.ask(QUESTION, max_new_tokens=8)
    words = session.template.text(whole.token_ids[:4])
    with pytest.raises(ValueError, match="substring"):
        StopStringCriteria(tokenizer=session.processor.tokenizer, stop_strings=[words])
    stopped = session.ask(QUESTION, max_new_tokens=8, stop_strings=[words])
    assert stopped.token_ids == whole.token_ids[:4]
    assert stopped.finish_reason == "stop"


@pytest.mark.parametrize("where", ["option", "generation_config", "model"])
def test_the_time_that_an_answer_may_take_counts_from_its_question(session, video_model, monkeypatch, where):
    now = 0.0

    def a_second(*_):
        nonlocal now
        now += 1

    monkeypatch.setattr(time, "time", lambda: now)
    limit = {"max_time": 2.5}
    options = {"option": limit, "generation_config": {"generation_config": GenerationConfig(**limit)}}.get(where, {})
    hook = video_model.model.language_model.register_forward_hook(a_second)
    try:
        with own_settings(video_model, **(limit if where == "model" else {})):
            answer = session.ask(QUESTION, max_new_tokens=9, **options)
    finally:
        hook.remove()
    assert answer.stats.new_tokens == 3  # after 1 s, 2 s, and 3 s
    assert answer.finish_reason == "length"


def test_a_config_given_with_other_options_causes_no_warning(session, caplog, monkeypatch):
    log = transformers.utils.logging.get_logger("transformers")
    monkeypatch.setattr(log, "propagate", True)
    transformers.generation.utils.logger.warning_once.cache_clear()
    session.ask(QUESTION, max_new_tokens=2, generation_config=GenerationConfig(repetition_penalty=1.2))
    assert not [line for line in caplog.messages if "generation_config" in line]


def test_stopping_criteria_end_the_answer(session):
    class AfterThree(StoppingCriteria):
        def __init__(self):
            self.calls = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.calls += 1
            return torch.full((input_ids.shape[0],), self.calls >= 3)

    answer = session.ask(QUESTION, max_new_tokens=10, stopping_criteria=[AfterThree()])
    assert (answer.stats.new_tokens, answer.finish_reason) == (3, "stop")


def test_an_answer_says_whether_it_ended_by_itself(session):
    whole = session.ask(QUESTION, max_new_tokens=4)
    assert whole.finish_reason == whole.as_dict()["finish_reason"] == "length"
    end = whole.token_ids[3]
    first = whole.token_ids.index(end)
    for most in (first + 1, 9):  # also where it ends at the last token that it may have
        ended = session.ask(QUESTION, max_new_tokens=most, eos_token_id=end)
        assert (ended.stats.new_tokens, ended.finish_reason) == (first + 1, "stop")


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


CHANGED = {"guidance_scale": 2.0, "penalty_alpha": 0.6, "use_cache": False, "cache_implementation": "static"}
"""Refused values of settings for which 7 is not suitable."""


def test_every_setting_of_the_installed_transformers_is_in_one_table():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    tables = [set(WORKS), set(IDLE), set(SEARCHES), set(FORMS)]
    assert sum(map(len, tables)) == len(set.union(*tables)), "a setting is in two tables"
    if unknown := fields - set.union(*tables):
        pytest.skip(f"this transformers has settings that nobody has looked at, which are refused: {sorted(unknown)}")


def test_a_new_setting_of_transformers_is_refused_by_name(monkeypatch):
    class Later(GenerationConfig):
        def __init__(self, **options):
            self.top_x = options.pop("top_x", None)
            super().__init__(**options)

    monkeypatch.setattr("tieredkv.session.generation_settings._config_class", lambda: Later)
    check_options({"top_x": None})
    with pytest.raises(OptionError, match=r"^top_x=3 is not supported"):
        check_options({"top_x": 3})
    with pytest.raises(OptionError, match=r"^top_x=3, of the model's generation config, is not supported"):
        check_options({}, model_config=Later(top_x=3))


@pytest.mark.parametrize("name", [*SEARCHES, *FORMS])
def test_settings_that_select_another_decoding_are_refused_and_their_defaults_are_not(name):
    for plain in {**SEARCHES, **FORMS}[name]:
        check_options({name: plain})
    check_options({name: None})
    value = CHANGED.get(name, 7)
    with pytest.raises(OptionError, match=rf"^{name}={value!r} is not supported: leave it out, or set it to "):
        check_options({name: value})


@pytest.mark.parametrize("name", SEARCHES)
def test_another_search_in_the_models_config_is_refused_unless_the_caller_overrides_it(name):
    config, plain = GenerationConfig(), SEARCHES[name][0]
    setattr(config, name, CHANGED.get(name, 7))
    with pytest.raises(
        OptionError, match=rf"^{name}=.*, of the model's generation config, .*: give {name}={plain!r}\.$"
    ):
        check_options({}, model_config=config)
    check_options({name: plain}, model_config=config)


FORMS_OF_MODELS = [
    {"use_cache": False},
    {"cache_implementation": "hybrid"},
    {"cache_implementation": "static", "max_cache_len": 64},
    {"prefill_chunk_size": 16},
    {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
    {"max_length": 4096},
    {"num_assistant_tokens": 5, "assistant_confidence_threshold": 0.2, "early_stopping": True, "length_penalty": 2.0},
    {"disable_compile": True, "low_memory": True, "diversity_penalty": 0.5, "decoder_start_token_id": 1},
]


@pytest.mark.parametrize("own", FORMS_OF_MODELS, ids=str)
def test_settings_that_change_no_token_are_ignored_in_the_models_own_config(session, video_model, own):
    plain = session.ask(QUESTION, max_new_tokens=6).token_ids
    with own_settings(video_model, **own):
        assert session.ask(QUESTION, max_new_tokens=6).token_ids == plain


@pytest.mark.parametrize("name", sorted(IDLE))
def test_settings_without_effect_are_accepted(session, name):
    value = {"transformers_version": "5.17.0", "num_assistant_tokens_schedule": "constant", "speculation_type": None}
    value |= {"assistant_ensemble_weight": 0.5}
    if not hasattr(GenerationConfig(), name):
        pytest.skip("not a setting of this transformers")
    plain = session.ask(QUESTION, max_new_tokens=2).token_ids
    assert session.ask(QUESTION, max_new_tokens=2, **{name: value.get(name, 1)}).token_ids == plain


@pytest.mark.parametrize("name", ["assistant_model", "custom_generate", "negative_prompt_ids", "synced_gpus"])
def test_another_loop_is_refused_and_none_at_all_is_not(name):
    check_options({name: None})
    with pytest.raises(OptionError, match=f"^{name} is not supported"):
        check_options({name: object()})


def test_a_function_of_allowed_tokens_is_used(session, stock):
    options = {"max_new_tokens": 5, "prefix_allowed_tokens_fn": lambda _, ids: [11, 12 + len(ids) % 2]}
    assert session.ask(QUESTION, **options).token_ids == stock(**options)


def test_the_fields_of_a_generation_config_are_checked(session):
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


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"temperature": -1.0, "do_sample": True}, "temperature"),
        ({"repetition_penalty": 0}, "penalty"),
        ({"eos_token_id": "</s>"}, "is not valid"),
        ({"suppress_tokens": "no"}, "is not valid"),
        ({"bad_words_ids": []}, "bad_words_ids"),
        ({"sequence_bias": [[[100_000], 1.0]]}, "is not valid"),
        ({"forced_eos_token_id": "x"}, "is not valid"),
        ({"max_new_tokens": "32"}, "max_new_tokens='32'"),
        ({"max_new_tokens": None, "max_length": "long"}, "max_length='long'"),
        ({"max_time": "5 s"}, "max_time='5 s'"),
        ({"stop_strings": 5}, "stop_strings"),
    ],
    ids=str,
)
def test_a_wrong_config_of_the_model_is_an_option_error(session, video_model, own, message):
    with own_settings(video_model, **own), pytest.raises(OptionError, match=message):
        session.ask(QUESTION)


def test_an_error_of_the_callers_processor_is_raised_unchanged(session):
    def fails(ids, scores):
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$") as caught:
        session.ask(QUESTION, max_new_tokens=2, logits_processor=[fails])
    assert not isinstance(caught.value, OptionError)


def test_the_models_own_longest_sequence_applies_when_no_length_is_given(session, video_model):
    prompt = session.ask(QUESTION, max_new_tokens=1).stats.prompt_tokens
    with own_settings(video_model, max_new_tokens=None, max_length=prompt + 3):
        assert session.ask(QUESTION).stats.new_tokens == 3
        assert session.ask(QUESTION, max_new_tokens=5).stats.new_tokens == 5
    with (
        own_settings(video_model, max_new_tokens=None, max_length=prompt),
        pytest.raises(OptionError, match=rf"max_length={prompt}, .* no room for an answer .*: give max_new_tokens"),
    ):
        session.ask(QUESTION)


def test_the_models_own_length_applies_when_none_is_given(session, video_model):
    assert session.new_tokens({}) == video_model.generation_config.max_new_tokens == 32


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True])
def test_an_invalid_length_is_refused(value):
    with pytest.raises(OptionError, match="max_new_tokens"):
        check_options({"max_new_tokens": value})


def test_an_unknown_option_of_generate_is_refused_before_anything_is_loaded():
    with pytest.raises(OptionError, match="Did you mean max_frames"):
        tieredkv.generate("/nowhere", "nothing.mp4", "what ?", max_frame=3)


def test_generate_makes_no_cache_of_its_own(session, video_model, monkeypatch):
    caches = []
    monkeypatch.setattr(transformers.generation.utils, "DynamicCache", lambda *args, **options: caches.append(args))
    session.ask(QUESTION, max_new_tokens=2, use_cache=True)
    assert caches == []
