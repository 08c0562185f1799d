"""The contract of a model family: what differs between families, and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

Positions = Literal["published", "stock"]
"""How text after a video is numbered: by the model authors' rule, or as transformers does it."""


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """A video as the decoder takes it."""

    features: torch.Tensor | None
    """`(n, hidden)` one embedding per visual token, on the host; None once they are prefilled."""
    grid: tuple[int, int, int]
    """Temporal steps, rows and columns of visual tokens; their product is n."""
    seconds_per_step: float

    @property
    def tokens(self) -> int:
        """n, visual tokens."""
        return math.prod(self.grid)


class VideoFamily(Protocol):
    """Everything the runtime asks of a family that takes video."""

    text_model_type: str
    """`model_type` of the decoder's own config."""

    def video_token(self, processor: Any) -> str:
        """The placeholder that the chat template writes once per video."""

    def preprocess(self, processor: Any, frames: Any, fps: float) -> dict[str, torch.Tensor]:
        """The processor's patches for uint8 frames `(T, H, W, 3)` sampled at `fps`."""

    def encode_segments(self, model: Any, inputs: dict[str, torch.Tensor], segment_frames: int) -> Any:
        """Iterate over the vision tower's features, segment by segment, equal to encoding the whole at once."""

    def grid(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[int, int, int]:
        """Temporal steps, rows and columns of visual tokens."""

    def seconds_per_step(self, model: Any, fps: float) -> float:
        """Time one temporal step of visual tokens covers, for frames sampled at `fps`."""

    def positions(
        self, model: Any, head: int, video: EncodedVideo, tail: int, rule: Positions
    ) -> tuple[torch.Tensor, int]:
        """Position ids `(axes, head + visual + tail)` of a prompt, and the position of the first generated token."""

    def embed(self, model: Any, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `(1, n, hidden)` of text tokens `(1, n)`."""

    def decode(self, model: Any, embeddings: torch.Tensor, position_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Hidden states `(1, n, hidden)` of the decoder. position_ids `(axes, n)`."""

    def logits(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits of hidden states, float32."""
