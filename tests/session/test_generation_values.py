"""Generation settings with values that they cannot have are refused before any work; others pass."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig

from tieredkv.errors import OptionError
from tieredkv.session.generation_settings import IDLE, WORKS, check_options
from tieredkv.session.generation_values import RULES, as_fractions, check_values

GOOD = {
    "max_new_tokens": (1, 10_000),
    "min_new_tokens": (0, 5),
    "min_length": (0, 5),
    "max_time": (0, 0.5, 10),
    "stop_strings": ("stop", ["stop", "end"]),
    "do_sample": (True, False),
    "seed": (0, -1, 2**63 - 1),
    "temperature": (0, 0.7, 2),
    "top_k": (0, 50),
    "top_p": (0, 0.9, 1),
    "min_p": (0, 0.1, 1.0),
    "top_h": (0.4, 1),
    "typical_p": (0.5, 1),
    "epsilon_cutoff": (0, 3e-4),
    "eta_cutoff": (0, 3e-4),
    "repetition_penalty": (0.5, 1, 1.2),
    "encoder_repetition_penalty": (1, 1.2),
    "no_repeat_ngram_size": (0, 3),
    "encoder_no_repeat_ngram_size": (0, 3),
    "renormalize_logits": (True, False),
    "remove_invalid_values": (True, False),
    "forced_bos_token_id": (3,),
    "forced_eos_token_id": (3, [3, 4]),
    "eos_token_id": (3, [3, 4]),
    "suppress_tokens": ([3, 4], (3,), []),
    "begin_suppress_tokens": ([3, 4],),
}
BAD = {
    "max_new_tokens": (0, 1.5, True),
    "max_time": (-1, "10", float("nan")),
    "stop_strings": (3, [3]),
    "do_sample": (1, "yes"),
    "temperature": ("hot", -1, float("inf"), True, [0.7]),
    "top_k": (-1, 1.5, "many"),
    "top_p": (2, -0.1, "most", True),
    "min_p": (2, "most"),
    "top_h": (0, 1.5),
    "typical_p": (0, 2),
    "epsilon_cutoff": (1, -1),
    "eta_cutoff": (1, "x"),
    "repetition_penalty": (0, -1, "much"),
    "no_repeat_ngram_size": (-1, 0.5),
    "remove_invalid_values": (1,),
    "eos_token_id": ("</s>", 1.5, ["</s>"], True),
    "suppress_tokens": (3, "no", [0.5]),
}


@pytest.mark.parametrize("name", RULES)
def test_values_of_the_right_kind_pass(name):
    for value in (None, *GOOD[name]):
        check_values({name: value})


@pytest.mark.parametrize("name", BAD)
def test_other_values_are_refused_in_one_sentence(name):
    for value in BAD[name]:
        with pytest.raises(OptionError, match=rf"^{name}=.* is not valid: give .*\.$") as refused:
            check_options({name: value})
        assert "\n" not in str(refused.value)
        with pytest.raises(OptionError, match=rf"^{name}=.* is not valid"):  # in a config of the caller's, too
            config = GenerationConfig()
            setattr(config, name, value)
            check_options({"generation_config": config})


@pytest.mark.parametrize("value", [0.5, True, "7", 2**63])
def test_a_seed_is_a_whole_number(value):
    with pytest.raises(OptionError, match=r"^seed=.* is not valid: give a whole number of 64 bits"):
        check_options({"seed": value})


def test_every_rule_is_of_a_supported_setting():
    assert RULES.keys() - {"seed"} <= WORKS | IDLE


def test_sampling_at_temperature_0_is_refused():
    check_values({"temperature": 0})
    with pytest.raises(OptionError, match="temperature=0 with do_sample=True is not valid"):
        check_values({"temperature": 0, "do_sample": True})


def test_whole_numbers_become_the_floats_that_transformers_wants():
    assert repr(as_fractions({"temperature": 2, "top_k": 2, "do_sample": True})) == (
        "{'temperature': 2.0, 'top_k': 2, 'do_sample': True}"
    )


@pytest.mark.parametrize("name", ["fps", "start", "max_pixels", "gpu_kv_gb", "policy", "system"])
def test_an_option_of_the_session_is_refused_by_naming_where_it_belongs(name):
    with pytest.raises(OptionError, match=f"'{name}' holds for all questions about a video: give it to open_session"):
        check_options({name: 3})
