"""The contract of a model family: what differs between families, with defaults for what most share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from tieredkv.environment.versions import NEWEST, OLDEST, cache_argument
from tieredkv.errors import OptionError
from tieredkv.video.frames import Sampled

Positions = Literal["published", "stock"]
"""How a prompt with a video is written and numbered: as the model's authors do it, or as transformers does."""


Kind = Literal["video", "image"]
"""What a prompt can show, by the name that chat templates have for it."""


@dataclass(frozen=True, slots=True)
class Slices:
    """Further pictures of each step, after that of the whole frame: tiles of it at a higher resolution, row by row."""

    rows: int
    """Rows of tiles."""
    columns: int
    """Tiles in a row."""
    height: int
    """Rows of visual tokens in each tile."""
    width: int
    """Visual tokens in a row of a tile."""
    before: tuple[tuple[int, ...], ...]
    """Token ids of the text before each tile."""

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of all tiles of a step."""
        return self.rows * self.columns * self.height * self.width

    @property
    def text_tokens(self) -> int:
        """Tokens of the text before all tiles of a step."""
        return sum(map(len, self.before))


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
    slices: Slices | None = None
    """Tiles of each frame, in families that have them; `rows` and `columns` are those of the whole frame."""
    trailing: int = 0
    """Text tokens after the video that the family numbers as part of its last step. They depend on the question."""

    @property
    def step_tokens(self) -> int:
        """Visual tokens of one temporal step; the most, in families that leave some out."""
        return self.rows * self.columns + (self.slices.visual_tokens if self.slices else 0)

    @property
    def step_length(self) -> int:
        """All tokens of one temporal step, including the text between its pictures."""
        return self.step_tokens + (self.slices.text_tokens if self.slices else 0)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the whole video."""
        return (sum(self.lengths) or self.steps * self.step_tokens) + self.closing

    @property
    def tokens(self) -> int:
        """All tokens, including the text inside and between steps."""
        return (sum(self.lengths) or self.steps * self.step_length) + self.closing + sum(map(len, self.between))

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

    def between_steps(self, index: int, begin: int) -> int:
        """The end of a call of tokens from `begin` on that is to end before token `index`, so that it splits no step:
        `index`, the start of the step it lies in, or that step's end if the call would be empty."""
        before = int(torch.searchsorted(self.starts(), index)) - 1
        if before < 0:
            return index
        start = int(self.starts()[before])
        stop = start + int(self._sizes()[before])
        if index >= stop:
            return index
        return start if start > begin else stop

    def is_visual(self) -> torch.Tensor:
        """Mask of the video's visual tokens, `(tokens,)`."""
        mask = torch.zeros(self.tokens, dtype=torch.bool, device="cpu")
        for start, step in zip(self.starts().tolist(), self._steps(True, False), strict=True):
            mask[start : start + len(step)] = torch.tensor(step, dtype=torch.bool, device="cpu")
        mask[self.tokens - self.closing :] = True
        return mask

    def ids(self, visual: int) -> list[int]:
        """Token ids of the video as transformers' processors write them, with `visual` for visual tokens."""
        texts = self.between or ((),) * self.steps
        steps = zip(texts, self._steps(visual), strict=True)
        return [token for text, step in steps for token in (*text, *step)] + [visual] * self.closing

    def _sizes(self) -> torch.Tensor:
        """All tokens of each step, `(steps,)`, without the text before it."""
        sizes = self.lengths or (self.step_length,) * self.steps
        return torch.tensor(sizes, dtype=torch.long, device="cpu")

    def _steps(self, visual: int, text: int | None = None) -> list[list[int]]:
        """Each step, with `visual` for visual tokens and `text` for the text in it; None: the text's own ids."""
        if self.lengths:
            return [[visual] * length for length in self.lengths]
        return [self._step(visual, text)] * self.steps

    def _step(self, visual: int, text: int | None = None) -> list[int]:
        """One step, with `visual` for visual tokens and `text` for those of the text in it; None: their own ids."""
        tokens = [visual] * (self.rows * self.columns)
        for ids in self.slices.before if self.slices else ():
            tokens += ids if text is None else [text] * len(ids)
            tokens += [visual] * (self.slices.height * self.slices.width if self.slices else 0)
        return tokens


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
    time_form: str | None = None
    """How its prompts write the time of frames, by an example; None: they do not."""
    tested: tuple[str, str] = (OLDEST, NEWEST)
    """The oldest and the newest transformers that it is tested with."""
    alone: str = ""
    """Why a prompt cannot show a second video or picture; empty if it can."""

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

    def numbered_opening(self, processor: Any, number: int, frames: int, seconds: float, times: Sequence[float]) -> str:
        """`opening` of the `number`-th video of a prompt, from 0."""
        return self.opening(processor, frames, seconds, times)

    def between(self, processor: Any, step: int, times: Sequence[float]) -> str | None:
        """Text between the step before and `step`. times: as for `opening`. None: the family never writes any.

        Not None in families that write something after every step, or into steps.
        """
        return None

    def introduction(self, processor: Any, step: int, times: Sequence[float]) -> str | None:
        """The text just before a step's pictures, before which subtitles stand: how what `opening` and `between` write
        ends, or the text before a video of which they write nothing. None: no further text can stand there."""
        return ""

    def after(self, processor: Any, times: Sequence[float], slices: Slices | None) -> str:
        """Text after every step, before what `between` or `ending` returns. times: as for `opening`."""
        return ""

    def ending(self, processor: Any) -> str:
        """Text that replaces the placeholder after the last step."""
        return ""

    # ---- pixels

    @abstractmethod
    def frame_grid(self, config: Any, processor: Any, sampled: Sampled) -> tuple[int, int, int]:
        """Temporal steps, rows and columns of visual tokens of a video.

        sampled.max_pixels: most pixels of a frame as the vision tower sees it, in place of the processor's limits
        (None: those); frames are not enlarged to reach it. Raises `ValueError` if the processor refuses such frames,
        and `OptionError` if no frame has so few pixels, or frames have one fixed size.
        """

    @abstractmethod
    def tower_size(self, config: Any, processor: Any, rows: int, columns: int) -> tuple[int, int]:
        """Height and width in pixels of a picture of `rows` x `columns` visual tokens, as the vision tower sees it."""

    @abstractmethod
    def preprocessor(
        self, config: Any, processor: Any, sampled: Sampled
    ) -> Callable[[np.ndarray], dict[str, torch.Tensor]]:
        """A function that preprocesses a segment, uint8 `(n, H, W, 3)`, as the processor does in a whole video.

        sampled: the whole video, on whose number of frames the size may depend. The function is called with the
        segments of one video in order. A segment whose n is not a multiple of `step_frames` is padded; only the last
        may be.
        """

    def slices(self, config: Any, processor: Any, sampled: Sampled) -> Slices | None:
        """The tiles into which the processor cuts each frame; None: it does not.

        sampled.max_pixels: of a frame and its tiles together.
        """
        return None

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

    def whole_steps(self, config: Any) -> bool:
        """Whether tokens of a step see later ones of it, so that all of them must be in one call of the decoder."""
        return False

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

    def trailing(self, config: Any, tail: Sequence[int]) -> int:
        """`VideoGrid.trailing` of a prompt in which these token ids follow the video."""
        return 0

    def embed(self, model: Any, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `(1, n, hidden)` of text tokens `(1, n)`."""
        return model.get_input_embeddings()(input_ids)

    def decoder(self, model: Any) -> Any:
        """The text model."""
        return model.model.language_model

    def decode(self, model: Any, embeddings: torch.Tensor, position_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Hidden states `(1, n, hidden)`. embeddings: `(1, n, width)`, narrower ones, of text or of pictures, padded
        with zeros.

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


class TooFewPixels(OptionError):
    """A `max_pixels` below the fewest pixels that a processor makes of a frame."""

    def __init__(self, sampled: Sampled, least: int) -> None:
        """least: the lowest limit that works."""
        super().__init__(
            f"max_pixels={sampled.max_pixels} is too few for frames of {sampled.width}x{sampled.height}: this model "
            f"takes at least {least:,} pixels of them. Give max_pixels={least} or more."
        )
        self.least = least


def activation_bytes(patches: int, pixels: int, hidden: int, intermediate: int, dtype: torch.dtype | None) -> int:
    """Estimated activations of a vision tower over `patches` patches of `pixels` values each.

    For each patch: float32 pixels, 8 vectors of the hidden size and 3 of the intermediate size (ours).
    """
    itemsize = (dtype or torch.float32).itemsize
    return patches * (pixels * torch.float32.itemsize + itemsize * (8 * hidden + 3 * intermediate))
