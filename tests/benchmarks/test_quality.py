"""The quality benchmark: what it counts, and that replayed answers are those a session gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import tieredkv
from tieredkv.config import TierConfig
from tieredkv.models import families
from tieredkv.tiny.evaluate import TOKENS_PER_SECOND
from tieredkv.tiny.model import build_model
from tieredkv.tiny.processor import build_processor
from tieredkv.tiny.scene import FPS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import quality
import quality_report
import quality_suites
import replay
import video_tasks

pytestmark = pytest.mark.model
TOKENS = 512


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_5"])
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def model(architecture, video_model):
    """Random weights."""
    if architecture == "qwen2_5_vl":
        return video_model
    torch.manual_seed(1)
    hybrid = build_model(architecture).eval()
    hybrid.generation_config.eos_token_id = None
    return hybrid


@pytest.fixture(scope="module")
def processor(architecture):
    return build_processor(architecture)


@pytest.fixture(scope="module")
def film(model, processor):
    """A reader of a short video, and its scene."""
    with torch.no_grad(), tieredkv.use_attention(model):
        return video_tasks.read_video(model, processor, TOKENS, 0, TierConfig(chunk_tokens=8))


@pytest.fixture(scope="module")
def asked(model, processor, film):
    return video_tasks.ask(processor, families.video_family(model.config), film[1], 3)


@pytest.mark.parametrize("policy", ["full", "hybridkv", "snapkv", "streaming"])
def test_a_replayed_answer_is_right_as_far_as_a_sessions_greedy_answer(model, processor, film, asked, policy):
    tiers = TierConfig(policy=policy, chunk_tokens=8, **({} if policy == "full" else {"budget_ratio": 0.2}))
    reader, scene = film
    question = next(one for one in asked if one.task == "chain")
    with torch.no_grad(), tieredkv.use_attention(model):
        (replayed,) = replay.replay(reader, question, [tiers])
    words = processor.tokenizer.decode(question.prompt_ids)
    text = words.split("<|vision_end|>")[1].split("<|im_end|>")[0].strip()
    with tieredkv.open_session(model, scene.frames(), tiers=tiers, processor=processor, fps=FPS) as session:
        answer = session.ask(text, max_new_tokens=len(question.answer_ids))
    agree = [got == want for got, want in zip(answer.token_ids, question.answer_ids, strict=False)]
    so_far = [all(agree[: place + 1]) and place < len(agree) for place in question.scored]
    assert replayed.right_so_far == so_far


def test_a_second_question_follows_the_first_in_one_conversation(processor, film, asked):
    question = next(one for one in asked if one.task == "second")
    text = processor.tokenizer.decode([*question.before[0], *question.before[1], *question.prompt_ids])
    assert text.count("assistant") == 2
    assert "what colour was the" in text
    assert "follow the" in text.split("assistant")[1]


def test_replaying_leaves_the_reader_as_it_was(model, film, asked):
    reader, _ = film
    settings = [TierConfig(policy=name, chunk_tokens=8, budget_ratio=0.2) for name in ("hybridkv", "quest")]
    before = reader.cache.get_seq_length()
    with torch.no_grad(), tieredkv.use_attention(model):
        for question in asked:
            first = replay.replay(reader, question, settings)
            again = replay.replay(reader, question, settings)
            assert [a.nll for a in first] == [a.nll for a in again]
            if question.before is not None:
                replay.replay_unsealed(reader, question, settings)
    assert reader.cache.get_seq_length() == before


def test_memory_and_recall_are_the_true_values(model, film, asked):
    reader, _ = film
    heads = model.config.text_config.num_key_value_heads * len(reader.cache.tiered_layers)
    settings = [
        TierConfig(policy="full", chunk_tokens=8),
        TierConfig(chunk_tokens=8, budget_ratio=0.2, spare_ratio=0.0),
    ]
    with torch.no_grad(), tieredkv.use_attention(model):
        full, some = replay.replay(reader, asked[0], settings, recall=True)
    assert 1 <= full.held_bytes / full.full_bytes < 1.1
    assert 0.19 < some.held_bytes / some.full_bytes < 0.45
    assert full.recalls == []
    assert len(some.recalls) == some.steps * heads
    assert all(0.3 < one <= 1.0001 for one in some.recalls)


def test_rows_count_steps_and_pair_with_the_full_cache():
    def record(label, budget, number, right, nll):
        fields = {"policy": label} if label == "full" else {"policy": label, "budget_ratio": budget}
        return {
            "model": "smollm2", "task": "chain", "tokens": 10, "chunk_tokens": 8, "label": label, "fields": fields,
            "right": right, "so_far": right, "steps": [2, 2, 3], "nll": nll, "scored": 3, "held": 10, "full": 100,
            "missed": 50, "decoded": 5, "recall": None, "kl": None, "same": None, "question": [0, 2, number],
        }  # fmt: skip

    rows = quality_report.aggregate(
        [
            record("full", 1.0, 0, [1, 1, 1], 0.3),
            record("full", 1.0, 1, [1, 1, 0], 0.3),
            record("snapkv", 0.1, 0, [1, 0, 1], 0.6),
            record("snapkv", 0.1, 1, [0, 0, 0], 0.9),
        ]
    )
    row = next(r for r in rows if r["policy"] == "snapkv")
    assert (row["n"], row["accuracy"], row["accuracy_full"]) == (2, 0.25, 0.75)  # a step is right if all its tokens are
    assert row["low"] == 0.0
    assert row["high"] == 0.5
    assert row["ppl_ratio"] == pytest.approx(torch.tensor((1.5 - 0.6) / 6).exp().item())
    assert (row["kv_ratio"], row["bytes_per_step"], row["mass_recall"]) == (0.1, 10, None)


@pytest.mark.parametrize("suite", quality_suites.SUITES)
def test_every_setting_of_a_suite_is_one_that_exists(suite):
    contexts = quality_suites.units(suite, quick=False)
    assert len({unit.key for unit in contexts}) == len(contexts)
    for unit in contexts:
        quality._readings(unit)


def test_videos_are_as_long_as_asked(film):
    assert film[1].seconds == TOKENS / TOKENS_PER_SECOND
    assert film[0].cache.get_seq_length() > TOKENS


@pytest.mark.parametrize("suite", quality_suites.SUITES)
def test_every_context_has_one_full_cache_to_be_paired_with(suite):
    full: dict[tuple, int] = {}
    labels: dict[tuple, list] = {}
    for unit in quality_suites.units(suite, quick=False):
        context = (unit.model, unit.task, unit.tokens, unit.chunk_tokens, unit.number)
        full[context] = full.get(context, 0) + sum(label == quality_report.FULL for label, _ in unit.settings)
        labels.setdefault(context, []).extend(unit.settings)
    assert set(full.values()) == {1}
    assert all(len(set(each)) == len(each) for each in labels.values())


def test_finished_units_are_found_by_key(tmp_path):
    parts = tmp_path / "quality-text.parts.jsonl"
    assert quality.finished(parts) == {}
    first, second = quality_suites.units("text", quick=True)[:2]
    parts.write_text(json.dumps({"key": first.key, "records": [1]}) + "\n")
    assert quality.finished(parts).get(first.key) == [1]
    assert second.key not in quality.finished(parts)
