"""Answers one question: prefills its tokens after the video's, seals the cache and decodes the answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tieredkv.cache.looks import Looks
from tieredkv.cache.question import CONTEXT, Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.evidence import moments
from tieredkv.evidence.moments import Evidence, Wanted
from tieredkv.models.switch import use_attention
from tieredkv.planning.admission import Request, check_memory
from tieredkv.planning.prefill_plan import question_calls, question_rows
from tieredkv.session import generation
from tieredkv.session.cached_video import CachedVideo
from tieredkv.session.ingested_video import IngestedVideo
from tieredkv.session.results import Generation, Stats
from tieredkv.session.step_graph import StepGraph


@dataclass(frozen=True, slots=True)
class UserQuestion:
    """A question as a user asked it, checked as far as possible before its turn."""

    prompt: str
    options: dict[str, Any]
    """transformers' generation options."""
    chat: bool = False
    """Whether the conversation so far belongs to the prompt."""
    trace: bool = False
    evidence: Wanted = True

    def with_streamer(self, streamer: Any) -> UserQuestion:
        """The same, with a streamer."""
        return replace(self, options={**self.options, "streamer": streamer})


def ask(
    cached: CachedVideo, user_question: UserQuestion, earlier: Sequence[tuple[str, str]], check: Callable[[], None]
) -> Generation:
    """Answer a question. earlier: questions and answers of the conversation that come before it in the prompt.

    check: called before every chunk of the question and every step; may raise to stop. The cache is left as it was,
    whatever happens. Raises `PromptError`, `OptionError` or `BudgetError`.
    """
    model, template, cache, video = cached.model, cached.template, cached.cache, cached.video
    _, tail = template.around_video([*earlier, (user_question.prompt, None)])
    tail_ids = template.tail_ids(tail)
    prompt_tokens = video.tokens + tail_ids.shape[1]
    question = Question(
        max_new_tokens=generation.new_tokens(user_question.options, model.generation_config, prompt_tokens),
        prompt_tokens=prompt_tokens,
        rows=question_rows(cache.tiers, tail_ids.shape[1]),
        visual=video.is_visual(),
        looks=Looks(cache.tiers.chunk_tokens) if user_question.evidence else None,
        trace=user_question.trace,
    )
    cache.truncate(video.tokens)
    try:
        result = answer(cached, tail_ids, question, user_question.options, check)
        cached.same_model.check()  # the reader of a stream may have changed the model
        if question.looks is not None:
            rows, count = template.question_tokens(tail, user_question.prompt), len(result.token_ids)
            evidence = collect_evidence(cached, question.looks, rows, count, user_question.evidence == "tokens")
            result = replace(result, evidence=evidence)
    finally:
        cache.truncate(video.tokens)
        cache.expect(CONTEXT)
    return result


@torch.no_grad()
def answer(
    cached: CachedVideo, tail_ids: torch.Tensor, question: Question, options: dict[str, Any], check: Callable[[], None]
) -> Generation:
    """Answer the prompt that ends with `tail_ids` `(1, n)`. The cache must hold only the video, and is left sealed."""
    model, template, cache, video = cached.model, cached.template, cached.cache, cached.video
    started = time.perf_counter()
    family, device, tiers = template.family, model.get_input_embeddings().weight.device, cache.tiers
    prefix, tail = video.tokens, tail_ids.shape[1]
    options = generation.timed(options, model.generation_config)
    _make_room(cache, question, tail)
    cache.expect(question)
    cache.device_tier.transfer.reset()
    positions = family.positions(model, video.head_tokens, video.grid, prefix, prefix + tail, video.positions)
    with use_attention(model):
        # The question's last rows, which classify the heads, go in one call.
        for call in question_calls(tiers, prefix, prefix + tail):
            check()
            begin, stop = call.begin - prefix, call.stop - prefix
            embeddings = family.embed(model, tail_ids[:, begin:stop].to(device))
            hidden = family.decode(model, embeddings, positions[:, begin:stop], cache)
        logits = family.logits(model, hidden[:, -1]).to(device)
        check()
        cache.seal()

        def forward(token: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
            hidden = family.decode(model, family.embed(model, token), place, cache)
            return family.logits(model, hidden[:, -1]).to(device)  # with several cards: from the last to the first

        # Generated tokens follow the prompt, at the same position on all axes.
        steps = StepGraph(forward, cache, device, positions.shape[0], int(positions[0, -1]) + 1)

        def step(token: int) -> torch.Tensor:
            check()
            return steps(token)

        tokenizer = template.processor.tokenizer
        before_tail = torch.tensor([video.ids(template.visual_id)], dtype=torch.long, device="cpu")
        prompt_ids = torch.cat((before_tail, tail_ids), dim=1).to(device)
        decoded = generation.run(model, prompt_ids, logits, step, question.max_new_tokens, options, tokenizer)
    cache.finish()
    stats = _stats(cache, video, prefix + tail, decoded, started, steps.path)
    return Generation(template.text(decoded.token_ids), decoded.token_ids, stats, cache.counters.trace)


def collect_evidence(cached: CachedVideo, looks: Looks, rows: int, tokens: int, each: bool) -> Evidence:
    """The evidence of the last answer. rows: tokens from the question on. each: also of each of its `tokens` tokens."""
    cache, video = cached.cache, cached.video
    heads = cache.shape.num_attention_heads * sum(1 + layer.readers for layer in cache.tiered_layers)
    return moments.collect(looks, rows, heads, video.head_tokens, video.grid, video.span, tokens, each)


def _make_room(cache: TieredCache, question: Question, question_tokens: int) -> None:
    """Raise `BudgetError` unless both tiers can hold prompt and answer. question_tokens: of text after the video.

    Raises `UnsupportedModelError` if they are longer than the model's cache can be.
    """
    cache.long_context.check(0, question.prompt_tokens + question.max_new_tokens)
    request = Request(question.prompt_tokens, question_tokens, question.max_new_tokens)
    shorter = "shorten the question or the conversation"
    longer = f"lower max_new_tokens, or {shorter}"
    check_memory(cache.shape, cache.tiers, request, longer, shorter, room=cache.room, room_bytes=cache.host_bytes)
    if cache.room < request.tokens:
        cache.reserve(request.tokens)


def _stats(
    cache: TieredCache,
    video: IngestedVideo,
    prompt_tokens: int,
    decoded: generation.Decoded,
    started: float,
    decode_path: str,
) -> Stats:
    counters, count = cache.counters, len(decoded.token_ids)
    moved = (
        counters.warm_bytes
        + counters.missed_bytes
        + counters.prefetched_bytes
        + cache.device_tier.transfer.streamed_bytes
    )
    later = (decoded.last_token_at - decoded.first_token_at) * 1000
    return Stats(
        prompt_tokens=prompt_tokens,
        visual_tokens=video.grid.visual_tokens,
        new_tokens=count,
        kv_full_bytes=(prompt_tokens + count) * cache.shape.token_bytes,
        kv_cap_bytes=cache.tiers.cap_bytes,
        kv_device_peak_bytes=cache.device_tier.ledger.peak_bytes,
        kv_host_bytes=cache.host_bytes,
        static_heads=counters.static_heads,
        dynamic_heads=counters.dynamic_heads,
        selected_chunks=counters.selected,
        hit_rate=counters.hit_rate,
        unseen_mass=counters.unseen_mass,
        moved_bytes=moved,
        prefetched_bytes=counters.prefetched_bytes,
        ingest_s=video.ingest_s,
        ttft_s=decoded.first_token_at - started,
        tpot_ms=later / (count - 1) if count > 1 else None,
        decode_path=decode_path,
    )
