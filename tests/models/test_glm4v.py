"""GLM-V: the time of a step is written after it, in the way of the processor, whatever the model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import build, sampled_of
from helpers import assert_near, session_logits, stock_inputs, stock_logits

import tieredkv
from tieredkv.models import families


class RecordPrompt:
    """A logits processor that keeps the prompt."""

    ids: list[int] | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.ids is None:
            self.ids = input_ids[0].tolist()
        return scores


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (23, 60, 90, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "written"), [("glm4v", [2, 3, 3, 4, 4]), ("glm46v", ["2.5 seconds", "3.0 seconds", "3.5 seconds"])]
)
def test_the_time_after_a_step_is_when_it_begins_in_the_file(name, written, film):
    model, processor = build(name)
    record = RecordPrompt()
    options = {"fps": 4, "start": 2.5, "end": 2.5 + len(written) / 2}
    with tieredkv.open_session(model, film, processor=processor, gpu_kv_gb=1, **options) as session:
        session.ask("what ?", max_new_tokens=1, logits_processor=[record])
    text = processor.tokenizer.decode(record.ids).replace("<|image|>", "")
    steps = "".join(f"<|begin_of_image|><|end_of_image|>{time}" for time in written)
    assert f"user\n<|begin_of_video|>{steps}<|end_of_video|>what ?" in text


def test_the_processor_of_another_version_decides_how_times_are_written(film):
    """As in the checkpoints of GLM-4.6V, whose models are of type glm4v and glm4v_moe."""
    model, _ = build("glm4v")
    processor = copy.deepcopy(build("glm46v")[1])
    inputs = stock_inputs(processor, film, "what ?")
    assert "5.5 seconds<|end_of_video|>" in processor.tokenizer.decode(inputs["input_ids"][0])
    with tieredkv.open_session(model, film, processor=processor, gpu_kv_gb=1, fps=4) as session:
        assert_near(session_logits(session, "what ?", 2), stock_logits(model, inputs, 2))


@torch.no_grad()
def test_places_of_patches_do_not_depend_on_the_default_dtype():
    """From bfloat16 up, where whole numbers above 256 are rounded."""
    model, processor = build("glm4v")
    family, wide = families.video_family(model.config), np.random.default_rng(2).integers(0, 256, (2, 28, 4200, 3))
    inputs = family.preprocessor(model.config, processor, sampled_of(*wide.shape[:3]))(wide.astype(np.uint8))
    assert inputs["video_grid_thw"][0, 2] > 256
    expected = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    try:
        torch.set_default_dtype(torch.bfloat16)
        features = family.encode(model, inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_near(features, torch.cat(expected.pooler_output))
