"""Prompts as text and tokens: the processor's chat template around one video, and what is written inside the video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tieredkv.errors import PromptError, UnsupportedModelError, VideoError
from tieredkv.models.base import Positions, VideoFamily, VideoGrid
from tieredkv.video.frames import Sampled

Turn = tuple[str, str | None]
"""A question and its answer; None where the model is to write it."""


class ChatTemplate:
    """The chat template of a processor, cut at the video's placeholder."""

    def __init__(self, family: VideoFamily, processor: Any, rule: Positions = "published") -> None:
        """Raises `UnsupportedModelError` for what is no processor of a video model."""
        for part in ("video_processor", "tokenizer", "apply_chat_template"):
            if not hasattr(processor, part):
                kind = type(processor).__name__
                raise UnsupportedModelError(f"processor is a {kind} without {part}: give the model's AutoProcessor.")
        self.family, self.processor = family, processor
        self.placeholder = family.placeholder(processor, rule)
        self.visual_id: int = processor.tokenizer.convert_tokens_to_ids(family.visual_token(processor))
        """What stands for a visual token where token ids are asked for."""

    def around_video(self, turns: Sequence[Turn]) -> tuple[str, str]:
        """The text before the video and after it, of a conversation whose last answer is None.

        Raises `PromptError` for a question that holds the placeholder itself.
        """
        messages: list[dict[str, Any]] = []
        for question, answer in turns:
            for reserved in (self.placeholder, self.family.visual_token(self.processor)):
                if reserved in question:
                    raise PromptError(f"the prompt contains {reserved!r}, which stands for the video: leave it out.")
            content = [] if messages else [{"type": "video"}]
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
            if answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        head, found, tail = text.partition(self.placeholder)
        if not found:
            raise UnsupportedModelError("the processor's chat template writes no placeholder for the video.")
        return head, tail

    def head_ids(self, config: Any, head: str, video: Sampled) -> torch.Tensor:
        """Token ids `(1, n)` of all that comes before the first step. head: from `around_video`."""
        times = video.times(0, self.family.step_frames(config))
        return self.tokenize(head + self.family.opening(self.processor, video.frames, video.seconds, times))

    def between_ids(self, step: int, times: Sequence[float]) -> tuple[int, ...] | None:
        """Token ids between a step and the one before; None where the family never writes any."""
        text = self.family.between(self.processor, step, times)
        if text is None:
            return None
        return tuple(self.processor.tokenizer(text, add_special_tokens=False).input_ids) if step else ()

    def tail_ids(self, tail: str) -> torch.Tensor:
        """Token ids `(1, n)` of all that comes after the video. tail: from `around_video`."""
        return self.tokenize(self.family.ending(self.processor) + tail)

    def grid(self, config: Any, video: Sampled) -> VideoGrid:
        """The tokens of a video as expected. Raises `VideoError` when the processor refuses frames of this size."""
        family, step_frames = self.family, self.family.step_frames(config)
        try:
            steps, rows, columns = family.frame_grid(
                config, self.processor, video.frames, video.height, video.width, video.fps
            )
        except ValueError as error:
            raise refused(video, error) from None
        between = [self.between_ids(step, video.times(step, step_frames)) for step in range(steps)]
        written = () if steps == 0 or between[0] is None else tuple(ids or () for ids in between)
        closing = family.closing_tokens(config)
        return VideoGrid(steps, rows, columns, step_frames / video.fps, written, closing, step_frames)

    def tokenize(self, text: str) -> torch.Tensor:
        """Token ids `(1, n)`."""
        ids = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        return torch.tensor([ids], dtype=torch.long, device="cpu")

    def text(self, token_ids: list[int]) -> str:
        """The text of generated tokens, without special ones."""
        return self.processor.tokenizer.decode(token_ids, skip_special_tokens=True).strip()


def refused(video: Sampled, error: ValueError) -> VideoError:
    """What to raise where a processor refuses frames."""
    return VideoError(f"the model's processor refuses frames of {video.width}x{video.height}: {error}")


def check_prompt(prompt: Any) -> None:
    """Raise `PromptError` unless `prompt` is text with something in it."""
    if not isinstance(prompt, str):
        raise PromptError(f"the prompt is a {type(prompt).__name__}: give the question as text.")
    if not prompt.strip():
        raise PromptError("the prompt is empty: ask something.")
