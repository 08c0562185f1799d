"""Several videos and still pictures in one prompt: what transformers writes, numbers and answers, or a refusal."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from families import BUILD, build
from helpers import RecordLogits, assert_near, stock_logits, tier_options

import tieredkv
from tieredkv.video.media import Video

QUESTIONS = ("what is it ?", "and who is that ?")
OPTIONS = {"gpu_kv_gb": 1, "fps": 4, "positions": "stock"}
ALONE = ("minicpmv4_7",)
SAME_LENGTH = ("llava_onevision", "internvl", "perception_lm", "smolvlm")
"""Processors that take several videos only if they have the same number of frames; SmolVLM's writes the longest one's
number for all of them."""
SEVERAL = pytest.mark.parametrize("name", [name for name in BUILD if name not in ALONE])


def noise(seed: int, frames: int, height: int = 60, width: int = 90) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def films(name: str) -> list[np.ndarray]:
    if name in SAME_LENGTH:
        return [noise(1, 6), noise(2, 6)]
    return [noise(1, 7), noise(2, 10, 90, 60), noise(3, 2)]


def stock(processor: Any, media: list[Any], question: str, earlier: Any = (), fps: float = 4.0) -> Any:
    """Model inputs made by transformers alone. media: films as arrays, pictures as PIL images."""
    messages: list[dict[str, Any]] = []
    for number, (asked, answer) in enumerate((*earlier, (question, None))):
        kinds = ["video" if isinstance(one, np.ndarray) else "image" for one in media]
        shown = [] if number else [{"type": kind} for kind in kinds]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": asked}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    videos: Any = [torch.from_numpy(one).permute(0, 3, 1, 2) for one in media if isinstance(one, np.ndarray)]
    metadata: Any = [
        {"fps": fps, "total_num_frames": len(one), "frames_indices": list(range(len(one))), "duration": len(one) / fps}
        for one in videos
    ]
    if type(processor).__name__ == "SmolVLMProcessor":  # takes a list of videos for each text
        videos, metadata = [videos], [metadata]
    pictures = [one for one in media if not isinstance(one, np.ndarray)]
    given = {"images": pictures} if pictures else {}
    if videos:
        given |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array", DeprecationWarning)
        return processor(text=[text], return_tensors="pt", **given)


class RecordIds(RecordLogits):
    """Keeps the prompt that a session gives to processors of logits."""

    def __call__(self, input_ids, scores):
        self.ids = getattr(self, "ids", input_ids)
        return super().__call__(input_ids, scores)


def assert_equals_stock(session: Any, model: Any, processor: Any, media: list[Any]) -> None:
    for question in QUESTIONS:
        inputs, record = stock(processor, media, question), RecordIds()
        session.ask(question, max_new_tokens=4, do_sample=False, logits_processor=[record])
        assert record.ids.tolist() == inputs["input_ids"].tolist()
        assert_near(torch.cat(record.seen), stock_logits(model, inputs, 4))


@SEVERAL
@pytest.mark.parametrize("chunks", [{}, {"prefill_chunk": 17, "encode_batch": 10}], ids=["one call", "chunks"])
def test_two_questions_about_several_videos_equal_stock(name, chunks):
    model, processor = build(name)
    shown = films(name)
    media = [Video(film) for film in shown]
    with tieredkv.open_session(model, media, processor=processor, **tier_options(**OPTIONS, **chunks)) as session:
        assert_equals_stock(session, model, processor, shown)
