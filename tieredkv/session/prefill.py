"""Runs the decoder model over a video, `prefill_chunk` tokens at a time, from its beginning or from within."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from tieredkv.cache.question import CONTEXT
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.models.families.base import VideoGrid
from tieredkv.models.switch import use_attention
from tieredkv.session.ingested_video import Place
from tieredkv.session.video_embeddings import VideoEmbeddings, join


@torch.no_grad()
def prefill(
    video: VideoEmbeddings,
    head_ids: torch.Tensor,
    cache: TieredCache,
    before_call: Callable[[], None],
    after_call: Callable[[int], None],
    place: Place,
) -> None:
    """Cache the head `(1, n)` and the video, or what follows the tokens that are cached already.

    video: begins with the step in which the first token lies that is not cached, or with one before. before_call,
    after_call: called before each call of the model, and after it with the number of its tokens; either may raise to
    stop. An error in between leaves the cache in the middle of a call. place: of the head in the prompt; the tokens
    before it are cached.
    """
    template, model = video.template, video.model
    family, weight = template.family, model.get_input_embeddings().weight
    head, size, cached = head_ids.shape[1], cache.tiers.prefill_chunk, cache.get_seq_length() - place.tokens
    whole_steps = family.whole_steps(model.config)
    waiting = [family.embed(model, head_ids.to(weight.device))] if head and not cached else []
    waiting_tokens = 0 if cached else head
    cached_again = max(0, cached - head - video.grid.tokens)
    cache.expect(CONTEXT)

    def chunk(embeddings: torch.Tensor) -> None:
        nonlocal cached
        before_call()
        stop = cached + embeddings.shape[1]
        positions = family.positions(model, head, video.grid, cached, stop, template.positions) + place.shift
        family.decode(model, embeddings, positions, cache)
        cached = stop
        after_call(embeddings.shape[1])

    with use_attention(model):
        for part in video:
            skipped = min(cached_again, part.shape[0])
            cached_again -= skipped
            waiting.append(part[skipped:].unsqueeze(0).to(weight.device, weight.dtype))
            waiting_tokens += part.shape[0] - skipped
            if waiting_tokens < size:
                continue
            whole = join(waiting)
            while waiting_tokens >= size:
                stop = cached + size
                if whole_steps:
                    stop = video.grid.between_steps(stop - head, cached - head) + head
                begin, waiting_tokens = whole.shape[1] - waiting_tokens, waiting_tokens - (stop - cached)
                chunk(whole[:, begin : whole.shape[1] - waiting_tokens])
            waiting = [whole[:, whole.shape[1] - waiting_tokens :].clone()] if waiting_tokens else []
        if waiting_tokens:
            chunk(join(waiting))


def cached_steps(grid: VideoGrid, tokens: int, steps_at_once: int) -> VideoGrid:
    """The first steps of a video, a multiple of `steps_at_once`: the most that the first `tokens` tokens hold."""
    for steps in range(grid.steps // steps_at_once * steps_at_once, 0, -steps_at_once):
        if (first := first_steps(grid, steps)).tokens <= tokens:
            return first
    return first_steps(grid, 0)


def first_steps(grid: VideoGrid, steps: int) -> VideoGrid:
    """The grid of a video's first `steps` steps."""
    return replace(grid, steps=steps, between=grid.between[:steps], lengths=grid.lengths[:steps], closing=0)
