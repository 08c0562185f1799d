"""Prompts as text and tokens: the processor's chat template around one video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tieredkv.errors import PromptError, UnsupportedModelError
from tieredkv.models.base import VideoFamily

Turn = tuple[str, str | None]
"""A question and its answer; None where the model is to write it."""


class ChatTemplate:
    """The chat template of a processor, cut at the video's placeholder."""

    def __init__(self, family: VideoFamily, processor: Any) -> None:
        """Raises `UnsupportedModelError` for what is no processor of a video model."""
        for part in ("video_processor", "tokenizer", "apply_chat_template"):
            if not hasattr(processor, part):
                kind = type(processor).__name__
                raise UnsupportedModelError(f"processor is a {kind} without {part}: give the model's AutoProcessor.")
        self.processor = processor
        self.video_token = family.video_token(processor)

    def around_video(self, turns: Sequence[Turn]) -> tuple[str, str]:
        """The text before the video and after it, of a conversation whose last answer is None.

        Raises `PromptError` for a question that holds the placeholder itself.
        """
        messages: list[dict[str, Any]] = []
        for question, answer in turns:
            if self.video_token in question:
                raise PromptError(
                    f"the prompt contains {self.video_token!r}, which stands for the video: leave it out."
                )
            content = [] if messages else [{"type": "video"}]
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
            if answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        head, found, tail = text.partition(self.video_token)
        if not found:
            raise UnsupportedModelError("the processor's chat template writes no placeholder for the video.")
        return head, tail

    def tokenize(self, text: str) -> torch.Tensor:
        """Token ids `(1, n)`."""
        return self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    def text(self, token_ids: list[int]) -> str:
        """The text of generated tokens, without special ones."""
        return self.processor.tokenizer.decode(token_ids, skip_special_tokens=True).strip()


def check_prompt(prompt: Any) -> None:
    """Raise `PromptError` unless `prompt` is text with something in it."""
    if not isinstance(prompt, str):
        raise PromptError(f"the prompt is a {type(prompt).__name__}: give the question as text.")
    if not prompt.strip():
        raise PromptError("the prompt is empty: ask something.")
