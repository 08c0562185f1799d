"""The contract of a model family: what differs between families, with defaults for what most share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from tieredkv.environment.versions import NEWEST, OLDEST, cache_argument

Positions = Literal["published", "stock"]
"""How a prompt with a video is written and numbered: as the model's authors do it, or as transformers does."""


@dataclass(frozen=True, slots=True)
class VideoGrid:
    """A video as tokens: steps of rows of columns of visual tokens, in some families with text before each step."""

    steps: int
    """Temporal steps."""
    rows: int
    columns: int
    seconds_per_step: float
    between: tuple[tuple[int, ...], ...] = ()
    """Token ids of the text before each step; none before the first step, whose text is part of the prompt's head.
    Empty if a family writes nothing between steps."""
    closing: int = 0
    """Visual tokens after the last step that belong to no step."""
    frames_per_step: int = 2
    """Frames in a step; the last step may have fewer."""
    lengths: tuple[int, ...] = ()
    """Visual tokens of each step, in families that leave some out. Empty: rows x columns in each."""

    @property
    def step_tokens(self) -> int:
        """Visual tokens of one temporal step; the most, in families that leave some out."""
        return self.rows * self.columns

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the whole video."""
        return (sum(self.lengths) or self.steps * self.step_tokens) + self.closing

    @property
    def tokens(self) -> int:
        """All tokens, including the text between steps."""
        return self.visual_tokens + sum(map(len, self.between))

    def starts(self) -> torch.Tensor:
        """Index of each step's first visual token, `(steps,)`, from the video's first token."""
        sizes = self._sizes()
        plain = sizes.cumsum(0) - sizes
        if not self.between:
            return plain
        lengths = [len(ids) for ids in self.between[: self.steps]]
        return plain + torch.tensor(lengths, dtype=torch.long, device="cpu").cumsum(0)

    def step_of(self, index: torch.Tensor) -> torch.Tensor:
        """The step of each token of the video: text belongs to the step after it, closing tokens to the last."""
        ends = self.starts() + self._sizes()
        return torch.bucketize(index, ends, right=True).clamp(max=self.steps - 1)

    def is_visual(self) -> torch.Tensor:
        """Mask of the video's visual tokens, `(tokens,)`."""
        mask = torch.zeros(self.tokens, dtype=torch.bool, device="cpu")
        sizes = self._sizes()
        text = (self.starts() - sizes.cumsum(0) + sizes).repeat_interleave(sizes)  # tokens of text before each
        mask[text + torch.arange(len(text), device="cpu")] = True
        mask[self.tokens - self.closing :] = True
        return mask

    def ids(self, visual: int) -> list[int]:
        """Token ids of the video as transformers' processors write them, with `visual` for visual tokens."""
        texts = self.between or ((),) * self.steps
        steps = zip(texts, self._sizes().tolist(), strict=True)
        return [token for text, size in steps for token in (*text, *[visual] * size)] + [visual] * self.closing

    def _sizes(self) -> torch.Tensor:
        """Visual tokens of each step, `(steps,)`."""
        sizes = self.lengths or (self.step_tokens,) * self.steps
        return torch.tensor(sizes, dtype=torch.long, device="cpu")


class VideoFamily(ABC):
    """Everything that the runtime needs from a video family.

    Defaults are for families that write nothing between steps and whose decoder numbers positions on one axis.
    """

    model_types: tuple[str, ...]
    """`model_type` of the configs of its models."""
    vision_modules: frozenset[str]
    """Names, in transformers, of the vision tower and of the modules and parameters that connect it to the decoder."""
    settings: tuple[str, ...] = ()
    """Fields of the config, besides those that many families have, on which keys and values depend."""
    vision_settings: tuple[str, ...] = ()
    """The same of the vision tower's config."""
    tested: tuple[str, str] = (OLDEST, NEWEST)
    """The oldest and the newest transformers that it is tested with."""

    # ---- text

    def placeholder(self, processor: Any, rule: Positions) -> str:
        """The text of the chat template that the video's tokens replace."""
        return processor.video_token

    def visual_token(self, processor: Any) -> str:
        """The token that processors write for each visual token of a video."""
        return processor.video_token

    def opening(self, processor: Any, frames: int, seconds: float, times: Sequence[float]) -> str:
        """Text that replaces the placeholder before the first step. times: in seconds, of the step's frames.

        frames, seconds: of the whole video, as expected before it is decoded.
        """
        return ""

    def between(self, processor: Any, step: int, times: Sequence[float]) -> str | None:
        """Text between the step before and `step`. times: as for `opening`. None: the family never writes any."""
        return None

    def ending(self, processor: Any) -> str:
        """Text that replaces the placeholder after the last step."""
        return ""

    # ---- pixels

    @abstractmethod
    def frame_grid(
        self, config: Any, processor: Any, frames: int, height: int, width: int, fps: float
    ) -> tuple[int, int, int]:
        """Temporal steps, rows and columns of visual tokens for `frames` frames of `height` x `width` pixels.

        Raises `ValueError` if the processor refuses such frames.
        """

    @abstractmethod
    def preprocessor(
        self, config: Any, processor: Any, frames: int, height: int, width: int, fps: float
    ) -> Callable[[np.ndarray], dict[str, torch.Tensor]]:
        """A function that preprocesses a segment, uint8 `(n, H, W, 3)`, as the processor does in a whole video.

        frames: number in the whole video, on which the size may depend. The function is called with the segments of
        one video in order. A segment whose n is not a multiple of `step_frames` is padded; only the last may be.
        """

    def step_frames(self, config: Any) -> int:
        """Frames in one temporal step."""
        return 1

    @abstractmethod
    def encode(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The vision tower's features `(n, width)` of a preprocessed segment, equal to those of the whole video.

        width is a multiple of the decoder's hidden size, as `decode` expects.
        """

    def lengths(self, inputs: dict[str, torch.Tensor]) -> tuple[int, ...] | None:
        """How many features of each step of a preprocessed segment `encode` returns. None: those of the whole grid."""
        return None

    @abstractmethod
    def encode_bytes(self, config: Any, grid: tuple[int, int, int]) -> int:
        """Estimated activations of the vision tower for one temporal step. grid: steps, rows and columns."""

    def closing(self, model: Any) -> torch.Tensor | None:
        """Features `(n, width)` after the last step that belong to no frame."""
        return None

    def closing_tokens(self, config: Any) -> int:
        """Number of features that `closing` returns."""
        return 0

    # ---- decoder

    def text_types(self) -> tuple[str, ...]:
        """`model_type` of the configs of the texts, of its models, that it is tested with."""
        return tuple(f"{kind}_text" for kind in self.model_types)

    def positions(
        self, model: Any, head: int, video: VideoGrid, begin: int, stop: int, rule: Positions
    ) -> torch.Tensor:
        """Position ids `(axes, stop - begin)` of prompt tokens begin..stop: `head` text tokens, the video, then text.

        While a video is being read, `video` needs only the steps of tokens before `stop`.
        """
        return torch.arange(begin, stop, device="cpu").unsqueeze(0)

    def embed(self, model: Any, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `(1, n, hidden)` of text tokens `(1, n)`."""
        return model.get_input_embeddings()(input_ids)

    def decoder(self, model: Any) -> Any:
        """The text model."""
        return model.model.language_model

    def decode(self, model: Any, embeddings: torch.Tensor, position_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Hidden states `(1, n, hidden)`. embeddings: `(1, n, width)`, those of text padded with zeros to width.

        position_ids: `(axes, n)`.
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
    """Estimated activations of a vision tower over `patches` patches of `pixels` values each.

    For each patch: float32 pixels, 8 vectors of the hidden size and 3 of the intermediate size (ours).
    """
    itemsize = (dtype or torch.float32).itemsize
    return patches * (pixels * torch.float32.itemsize + itemsize * (8 * hidden + 3 * intermediate))
