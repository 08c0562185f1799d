"""What shares a card with the cap: the default that is left, what is refused, and what fits instead."""

from __future__ import annotations

import re

import pytest
from command_line import run
from test_forecast import published_config

from tieredkv.errors import BudgetError, OptionError
from tieredkv.memory import limits
from tieredkv.memory.units import GIB
from tieredkv.models.long_context import trained_tokens
from tieredkv.planning.card_memory import WORKSPACE_BYTES, default_gpu_kv_gb
from tieredkv.planning.forecast import plan


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(limits, "available_host_bytes", lambda: 64 * GIB)


@pytest.fixture(scope="module")
def three_billion():
    return published_config(36, 16, 2, 2048, 11_008, tied=True)


@pytest.fixture(scope="module")
def seven_billion():
    return published_config(28, 28, 4, 3584, 18_944, tied=False)


# ---- the default


@pytest.mark.parametrize(
    ("free", "weights", "working", "cap"),
    [(12.0, 7.0, 0.5, 4.0), (12.0, 7.04, 0.5, 3.9), (8.0, 6.81, 0.5, 0.19), (8.0, 7.5, 0.5, 0.0), (4.0, 7.0, 0.5, 0.0)],
)
def test_the_default_is_what_is_left_rounded_down(free, weights, working, cap):
    sizes = [int(gib * GIB) for gib in (free, weights, working)]
    assert default_gpu_kv_gb(*sizes) == cap
    assert cap * GIB + sum(sizes[1:]) + WORKSPACE_BYTES <= sizes[0] or cap == 0


def test_a_plan_for_a_card_uses_what_such_a_card_has_left(three_billion):
    memory_plan = plan(three_billion, 180_000, card="RTX 3060")
    assert 2.5 * GIB < memory_plan.cap_bytes < 4 * GIB
    assert memory_plan.card_bytes == 12 * GIB
    assert memory_plan.card_needed_bytes <= 12 * GIB
    assert memory_plan.card_needed_bytes + 0.2 * GIB > 12 * GIB
    assert plan(three_billion, 180_000, card="RTX 3090").cap_bytes > 12 * GIB + memory_plan.cap_bytes - GIB


def test_without_a_card_or_with_a_bandwidth_alone_the_default_is_4(three_billion):
    assert plan(three_billion, 1000).cap_bytes == 4 * GIB
    memory_plan = plan(three_billion, 1000, card="360 GB/s")
    assert memory_plan.cap_bytes == 4 * GIB
    assert memory_plan.card_needed_bytes is None
    assert "\non " not in str(memory_plan)


def test_the_table_has_a_row_for_the_card(three_billion):
    row = next(line for line in str(plan(three_billion, 180_000, card="3060")).splitlines() if line[:3] == "on ")
    assert re.fullmatch(
        r"on RTX 3060 +1[12][\d.]* of 12 GiB: weights 6\.99, KV [\d.]+, activations [\d.]+, CUDA .*", row
    )


# ---- what does not fit


def test_a_cap_that_exceeds_the_card_is_refused_with_one_that_fits(three_billion):
    with pytest.raises(BudgetError, match=r"the RTX 3060 has 12 GiB, and this takes 19.*: weights 6\.99, ") as refused:
        plan(three_billion, 180_000, card="RTX 3060", gpu_kv_gb=11)
    caps = [float(text) for text in re.findall(r"gpu_kv_gb=([\d.]+)", str(refused.value).rstrip("."))]
    plan(three_billion, 180_000, card="RTX 3060", gpu_kv_gb=caps[0])
    plan(three_billion, 180_000, card="RTX 3060", gpu_kv_gb=caps[1], weights="8bit")
    plan(three_billion, 180_000, card="RTX 3060", gpu_kv_gb=caps[2], weights="4bit")
    with pytest.raises(BudgetError):
        plan(three_billion, 180_000, card="RTX 3060", gpu_kv_gb=caps[0] + 0.2)


def test_a_cap_larger_than_the_cache_counts_as_what_is_used(three_billion):
    assert plan(three_billion, 10_000, card="RTX 3060", gpu_kv_gb=11).card_needed_bytes < 11 * GIB


def test_weights_that_exceed_the_card_are_refused_with_those_that_fit(seven_billion):
    with pytest.raises(BudgetError, match=r"weights 15\.4, .*\. Give weights='8bit' or weights='4bit'\.$"):
        plan(seven_billion, 180_000, card="RTX 3060")
    assert plan(seven_billion, 180_000, card="RTX 3060", weights="4bit").cap_bytes > 2 * GIB


def test_what_fits_in_no_way_says_so(seven_billion):
    config = published_config(64, 40, 8, 5120, 27_648, tied=False)
    with pytest.raises(BudgetError, match=r"Give a smaller model, or fewer tokens"):
        plan(config, 100_000, card="RTX 4060")


def test_the_command_refuses_with_exit_code_2_and_prints_no_json(monkeypatch, capsys, tmp_path, seven_billion):
    seven_billion.save_pretrained(tmp_path)
    arguments = ["plan", "100000", "-m", str(tmp_path), "--card", "RTX 3060", "--json"]
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert "or weights='4bit'." in err
    code, out, err = run(monkeypatch, capsys, *arguments, "--weights", "4bit")
    assert (code, err) == (0, "")
    assert '"quantisation": "bitsandbytes, 4 bits"' in out


def test_weights_of_a_loaded_model_cannot_be_planned_otherwise(video_model):
    with pytest.raises(OptionError, match="this model is loaded: leave it out"):
        plan(video_model, 100, weights="4bit")


# ---- the trained length


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 4096),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4096}, 16_384),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, 8192),
    ],
)
def test_the_trained_length_is_the_configs_with_its_scaling(rope, tokens):
    from transformers import LlamaConfig

    assert trained_tokens(LlamaConfig(max_position_embeddings=4096, rope_parameters=rope)) == tokens


def test_a_prompt_beyond_the_trained_length_is_said(three_billion):
    assert "more than the 32,768 that the model is made for" in str(plan(three_billion, 32_768))
    assert "made for" not in str(plan(three_billion, 32_000))
