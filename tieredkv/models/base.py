"""The contract of a model family: what differs between families, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

Positions = Literal["published", "stock"]
"""How text after a video is numbered: by the model authors' rule, or as transformers does it."""


@dataclass(frozen=True, slots=True)
class VideoGrid:
    """The visual tokens of a video, as the decoder takes them: time first, then rows, then columns."""

    steps: int
    """Temporal steps."""
    rows: int
    columns: int
    seconds_per_step: float

    @property
    def step_tokens(self) -> int:
        """Visual tokens of one temporal step."""
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """All visual tokens."""
        return self.steps * self.step_tokens


class VideoFamily(Protocol):
    """Everything the runtime asks of a family that takes video."""

    text_model_type: str
    """`model_type` of the decoder's own config."""

    def video_token(self, processor: Any) -> str:
        """The placeholder that the chat template writes once per video."""

    def frame_grid(
        self, config: Any, processor: Any, frames: int, height: int, width: int, fps: float
    ) -> tuple[int, int, int]:
        """Temporal steps, rows and columns of visual tokens for `frames` frames of `height` x `width` pixels.

        No pixel is needed. Raises `ValueError` where the processor refuses such frames.
        """

    def preprocessor(
        self, config: Any, processor: Any, frames: int, height: int, width: int, fps: float
    ) -> Callable[[np.ndarray], dict[str, torch.Tensor]]:
        """What makes patches of a segment, uint8 `(n, H, W, 3)`, as the processor would in a video of `frames` frames.

        A processor may size frames by how many there are, so segments must be told of the whole. A segment whose n is
        no multiple of `step_frames` is padded: only the last may be.
        """

    def step_frames(self, config: Any) -> int:
        """Frames in one temporal step."""

    def encode(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The vision tower's features `(n, hidden)` of a preprocessed segment, as encoding the whole video gives."""

    def positions(
        self, model: Any, head: int, video: VideoGrid, begin: int, stop: int, rule: Positions
    ) -> torch.Tensor:
        """Position ids `(axes, stop - begin)` of prompt tokens begin..stop: `head` of text, the video, then text.

        While a video is still being read, `video` needs as many steps as the tokens up to `stop` and no more.
        """

    def embed(self, model: Any, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `(1, n, hidden)` of text tokens `(1, n)`."""

    def decode(self, model: Any, embeddings: torch.Tensor, position_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Hidden states `(1, n, hidden)` of the decoder. position_ids `(axes, n)`."""

    def logits(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits of hidden states, float32."""
