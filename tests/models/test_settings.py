"""Settings are readable and comparable; a change that matters to a session is named."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from tieredkv.models.settings import model_settings, processor_settings, settings_difference
from tieredkv.tiny import model as tiny

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def bundled() -> Any:
    _, processor = tiny.load()
    return processor


@pytest.fixture
def processor(bundled: Any) -> Any:
    """A copy that a test may change."""
    return copy.deepcopy(bundled)


def test_the_settings_of_a_text_model_are_those_of_its_text(llama: Any) -> None:
    assert model_settings(llama)["text"]["num_key_value_heads"] == 2
    assert model_settings(llama)["vision"] == {}


def test_settings_are_the_same_after_json(processor: Any) -> None:
    settings = processor_settings(processor)
    assert json.loads(json.dumps(settings)) == settings
    assert settings_difference(json.loads(json.dumps(settings)), settings) is None


def test_a_changed_size_is_named_with_both_values(processor: Any) -> None:
    before = processor_settings(processor)
    processor.video_processor.size = {"shortest_edge": 3136, "longest_edge": 6272}
    named = settings_difference(before, processor_settings(processor))
    assert named == "video_processor.size.longest_edge was 3136, is 6272"


def test_a_changed_template_and_vocabulary_are_named(processor: Any) -> None:
    before = processor_settings(processor)
    processor.chat_template += " "
    processor.tokenizer.add_tokens(["<new>"])
    named = settings_difference(before, processor_settings(processor))
    assert named is not None
    assert named.startswith("chat_template was ")
    assert "tokenizer.vocabulary was " in named


def test_only_the_first_differences_are_named() -> None:
    before, now = dict.fromkeys("abcde", 1), dict.fromkeys("abcde", 2)
    assert settings_difference(before, now) == "a was 1, is 2, b was 1, is 2, c was 1, is 2 and 2 more"


def test_settings_of_only_one_release_are_no_difference(processor: Any) -> None:
    before = processor_settings(processor)
    now = copy.deepcopy(before)
    now["video_processor"]["new_in_a_release"] = False
    assert settings_difference(before, now) is None
    assert settings_difference(now, before) is None


def test_types_of_results_and_devices_do_not_count(processor: Any) -> None:
    before = processor_settings(processor)
    processor.video_processor.return_metadata = True
    processor.video_processor.device = "cuda"
    assert processor_settings(processor) == before
