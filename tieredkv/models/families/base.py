"""The contract of a model family: what differs between families, with what most of them share as the default."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from tieredkv.environment.versions import cache_argument

Positions = Literal["published", "stock"]
"""How a video and what follows are laid out and numbered: by the model authors' rule, or as transformers does it."""

FLOAT32 = 4
"""Bytes."""


@dataclass(frozen=True, slots=True)
class VideoGrid:
    """A video as the decoder takes it: steps, of rows, of columns; in some families with text between steps."""

    steps: int
    """Temporal steps."""
    rows: int
    columns: int
    seconds_per_step: float
    between: tuple[tuple[int, ...], ...] = ()
    """Token ids before each step; the first step's are none, as what stands there is part of the prompt's head. Empty
    where a family writes nothing between steps."""
    closing: int = 0
    """Visual tokens behind the last step that belong to no step."""
    frames_per_step: int = 2
    """Frames that a step is made of; of the last maybe fewer."""

    @property
    def step_tokens(self) -> int:
        """Visual tokens of one temporal step."""
        return self.rows * self.columns

    @property
    def visual_tokens(self) -> int:
        """All visual tokens."""
        return self.steps * self.step_tokens + self.closing

    @property
    def tokens(self) -> int:
        """All tokens, the text between steps too."""
        return self.visual_tokens + sum(map(len, self.between))

    def starts(self) -> torch.Tensor:
        """Where each step's visual tokens begin, `(steps,)`, counted from the video's first token."""
        plain = torch.arange(self.steps, device="cpu") * self.step_tokens
        if not self.between:
            return plain
        lengths = [len(ids) for ids in self.between[: self.steps]]
        return plain + torch.tensor(lengths, dtype=torch.long, device="cpu").cumsum(0)

    def step_of(self, index: torch.Tensor) -> torch.Tensor:
        """The step that each of the video's tokens is of; text before a step, and what closes the video, is too."""
        ends = self.starts() + self.step_tokens
        return torch.bucketize(index, ends, right=True).clamp(max=self.steps - 1)

    def is_visual(self) -> torch.Tensor:
        """Which of the video's tokens are visual, `(tokens,)`."""
        mask = torch.zeros(self.tokens, dtype=torch.bool, device="cpu")
        mask[(self.starts().unsqueeze(1) + torch.arange(self.step_tokens, device="cpu")).flatten()] = True
        mask[self.tokens - self.closing :] = True
        return mask

    def ids(self, visual: int) -> list[int]:
        """Token ids of the video, `visual` for its visual tokens, as transformers' processors write them."""
        texts = self.between or ((),) * self.steps
        step = [visual] * self.step_tokens
        return [one for text in texts for one in (*text, *step)] + [visual] * self.closing


class VideoFamily(ABC):
    """Everything the runtime asks of a family that takes video.

    What is implemented here suits families whose decoder counts positions on one axis, and which write nothing between
    the steps of a video.
    """

    # ---- text

    def placeholder(self, processor: Any, rule: Positions) -> str:
        """What the chat template writes for a video, all of which the video's tokens stand in for."""
        return processor.video_token

    def visual_token(self, processor: Any) -> str:
        """What processors write for each visual token of a video."""
        return processor.video_token

    def opening(self, processor: Any, frames: int, seconds: float, times: Sequence[float]) -> str:
        """Text in the placeholder's stead, before the first step, whose frames are shown at `times`.

        frames, seconds: of the whole video, as expected before it is decoded.
        """
        return ""

    def between(self, processor: Any, step: int, times: Sequence[float]) -> str | None:
        """Text between a step and the one before, given when the step's frames are shown; None: never any."""
        return None

    def ending(self, processor: Any) -> str:
        """Text in the placeholder's stead after the last step."""
        return ""

    # ---- pixels

    @abstractmethod
    def frame_grid(
        self, config: Any, processor: Any, frames: int, height: int, width: int, fps: float
    ) -> tuple[int, int, int]:
        """Temporal steps, rows and columns of visual tokens for `frames` frames of `height` x `width` pixels.

        No pixel is needed. Raises `ValueError` where the processor refuses such frames.
        """

    @abstractmethod
    def preprocessor(
        self, config: Any, processor: Any, frames: int, height: int, width: int, fps: float
    ) -> Callable[[np.ndarray], dict[str, torch.Tensor]]:
        """What makes patches of a segment, uint8 `(n, H, W, 3)`, as the processor would in a video of `frames` frames.

        A processor may size frames by how many there are, so segments must be told of the whole. A segment whose n is
        no multiple of `step_frames` is padded: only the last may be.
        """

    def step_frames(self, config: Any) -> int:
        """Frames in one temporal step."""
        return 1

    @abstractmethod
    def encode(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The vision tower's features `(n, width)` of a preprocessed segment, as encoding the whole video gives.

        width is a multiple of the decoder's hidden size: `decode` takes them back.
        """

    @abstractmethod
    def encode_bytes(self, config: Any, grid: tuple[int, int, int]) -> int:
        """Activations of the vision tower for one temporal step, estimated. grid: steps, rows and columns."""

    def closing(self, model: Any) -> torch.Tensor | None:
        """Features `(n, width)` behind the last step, of no frame."""
        return None

    def closing_tokens(self, config: Any) -> int:
        """How many."""
        return 0

    # ---- decoder

    def positions(
        self, model: Any, head: int, video: VideoGrid, begin: int, stop: int, rule: Positions
    ) -> torch.Tensor:
        """Position ids `(axes, stop - begin)` of prompt tokens begin..stop: `head` of text, the video, then text.

        While a video is still being read, `video` needs as many steps as the tokens up to `stop` and no more.
        """
        return torch.arange(begin, stop, device="cpu").unsqueeze(0)

    def embed(self, model: Any, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `(1, n, hidden)` of text tokens `(1, n)`."""
        return model.get_input_embeddings()(input_ids)

    def decoder(self, model: Any) -> Any:
        """The text model."""
        return model.model.language_model

    def decode(self, model: Any, embeddings: torch.Tensor, position_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Hidden states `(1, n, hidden)`. embeddings `(1, n, hidden)` or `(1, n, width)`, position_ids `(axes, n)`.

        Where features are wider than the hidden size, text among them is padded with zeros.
        """
        axes = position_ids.shape[0]
        return (
            self.decoder(model)(
                inputs_embeds=embeddings,
                position_ids=(position_ids if axes == 1 else position_ids.unsqueeze(1)).to(embeddings.device),
                use_cache=True,
                **cache_argument(cache),
            )
        ).last_hidden_state

    def logits(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits of hidden states, float32."""
        return model.get_output_embeddings()(hidden).float()


def activation_bytes(patches: int, pixels: int, hidden: int, intermediate: int, dtype: torch.dtype | None) -> int:
    """Activations of a vision tower over `patches` patches of `pixels` values each, as its processor gives them.

    A patch's are counted as its float32 pixels, 8 vectors of the hidden size and 3 of the intermediate one (ours).
    """
    itemsize = (dtype or torch.float32).itemsize
    return patches * (pixels * FLOAT32 + itemsize * (8 * hidden + 3 * intermediate))
