"""The demo's reference: the same question through transformers' own `generate` and its full cache."""

from __future__ import annotations

from typing import Any

import torch

from tieredkv.models.families.base import VideoFamily, VideoGrid
from tieredkv.tiny.evaluate import prepare
from tieredkv.video.frames import Frames


@torch.no_grad()
def ask_stock(
    model: Any, processor: Any, family: VideoFamily, frames: Frames, video: VideoGrid, text: str, max_new_tokens: int
) -> str:
    """The answer of `model.generate`, computed from scratch but with the position ids of the session.

    Equal positions make the two answers differ by the cache alone.
    """
    inputs = prepare(processor, frames.pixels, text, frames.fps)
    visual = (inputs["mm_token_type_ids"][0] == 2).nonzero().squeeze(1)
    head, total = int(visual[0]), inputs["input_ids"].shape[1]
    positions = family.positions(model, head, video, 0, total, "published")
    ids = model.generate(**inputs, position_ids=positions.unsqueeze(1), max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.decode(ids[0, total:], skip_special_tokens=True).strip()
