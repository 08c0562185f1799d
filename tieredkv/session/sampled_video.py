"""The rate and the frame size of a session's video with `fit`, and what to say if a video does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tieredkv.config import TierConfig
from tieredkv.errors import BudgetError, OptionError
from tieredkv.memory import limits
from tieredkv.memory.units import GIB
from tieredkv.models.chat_template import ChatTemplate
from tieredkv.models.encode import at_processor_rate
from tieredkv.models.families.base import VideoGrid
from tieredkv.models.kv_shape import model_shape
from tieredkv.models.long_context import trained_tokens
from tieredkv.planning.advice import Advice
from tieredkv.planning.fitting import ONE_VIDEO, Film
from tieredkv.progress import tell
from tieredkv.session.checkpoint import Checkpoint, Damaged
from tieredkv.session.default_cap import default_cap
from tieredkv.video.frames import Sampled, VideoSource
from tieredkv.video.media import Medium
from tieredkv.video.sampling import Sampling

Advise = Callable[[VideoSource, Sampling], Advice]


def fitting(
    media: Sequence[Medium],
    processor: Any,
    sampling: Sampling,
    advise: Advise,
    checkpoint: Checkpoint | None,
    check: Callable[[], None],
    shown: bool,
) -> Sampling:
    """A sampling with `fit`, with the rate and the size chosen, which is reported if `shown`.

    check: as for `open_video`. Raises `OptionError` unless it is one video, `VideoError`, and `BudgetError`.
    """
    if len(media) > 1 or media[0].kind == "image":
        raise OptionError(ONE_VIDEO)
    sampling = as_begun(media[0].sampling(sampling), checkpoint)
    if not sampling.fit:
        return sampling
    if isinstance(media[0].source, Iterator):
        raise OptionError("fit=True would use up the iterator: give its frames as a list, or give fps and max_pixels.")
    source = media[0].open(at_processor_rate(sampling, processor), check)
    chosen, line = advise(source, sampling).fit(sampling)
    tell(line, shown)
    return chosen


def as_begun(sampling: Sampling, checkpoint: Checkpoint | None) -> Sampling:
    """A sampling with `fit`, with the choice of the ingest that is continued, if one is."""
    try:
        begun = None if checkpoint is None else checkpoint.begun()
    except Damaged:  # found again, and reported, when it is continued
        return sampling
    if begun is None or (chosen := begun.video.sampling) is None:
        return sampling
    fps = chosen.fps if sampling.fps is None else sampling.fps
    max_pixels = chosen.max_pixels if sampling.max_pixels is None else sampling.max_pixels
    return replace(sampling, fps=fps, max_pixels=max_pixels, fit=False)


def advice(
    model: Any, template: ChatTemplate, tiers: TierConfig, head: str, tail: str, max_new_tokens: int, folder: Path
) -> Advise:
    """What advises on the one video of a session. head, tail: the prompt's text before the video and after it. folder:
    on disk, for what `host_kv_gb` does not hold."""
    own = template.of_each()[0]
    weight = model.get_input_embeddings().weight
    shape = model_shape(model.config, weight.dtype)

    def after(sampled: Sampled, grid: VideoGrid) -> int:
        last = sampled.times(grid.steps - 1, grid.frames_per_step)
        return template.tail_ids(tail, last, grid.slices).shape[1]

    def text(sampled: Sampled, grid: VideoGrid) -> int:
        return template.text_ids(model.config, 0, head, sampled).shape[1] + after(sampled, grid)

    def advise(source: VideoSource, sampling: Sampling) -> Advice:
        sampled = Sampled.of(source, sampling.max_pixels)
        return Advice(
            Film(own, model.config, at_processor_rate(sampling, template.processor), sampled, text),
            shape,
            tiers,
            question_tokens=after(sampled, own.frames(model.config, sampled)),
            new_tokens=max_new_tokens,
            available=limits.available_host_bytes(),
            one_memory=weight.device.type == "cpu",
            card_bytes=_card_bytes(model, tiers),
            folder=folder,
            trained=trained_tokens(model.config),
        )

    return advise


def _card_bytes(model: Any, tiers: TierConfig) -> int | None:
    """What the card has for keys and values; None on the CPU."""
    try:
        cap = default_cap(model, tiers)
    except BudgetError:  # nothing
        return 0
    return None if cap is None else int(cap.gpu_kv_gb * GIB)
