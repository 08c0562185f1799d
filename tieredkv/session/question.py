"""Answers one question: prefills its tokens after the video's, seals the cache and decodes the answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from tieredkv.cache.looks import Looks
from tieredkv.cache.passage import Passage
from tieredkv.cache.question import CONTEXT, Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.errors import BudgetError
from tieredkv.evidence import moments
from tieredkv.evidence.moments import Evidence, Shown
from tieredkv.evidence.named_times import named_times
from tieredkv.evidence.target import Wanted
from tieredkv.memory.disk_reads import DiskCounts
from tieredkv.models.switch import use_attention
from tieredkv.planning.admission import Request, check_memory
from tieredkv.planning.prefill_plan import Call, context_calls, question_calls, question_rows
from tieredkv.session import generation
from tieredkv.session.cached_video import CachedVideo
from tieredkv.session.conversation import Conversation, Kept
from tieredkv.session.ingested_video import IngestedVideo
from tieredkv.session.results import Generation, Stats
from tieredkv.session.step_graph import StepGraph

WORTH_A_CALL = 512
"""Tokens from which a call of their own, which streams the whole past once more, is better than reading them again."""


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
    timestamps: bool = False
    """Whether the answer is searched for times."""

    def with_streamer(self, streamer: Any) -> UserQuestion:
        """The same, with a streamer."""
        return replace(self, options={**self.options, "streamer": streamer})


def ask(
    cached: CachedVideo, user_question: UserQuestion, conversation: Conversation, check: Callable[[], None]
) -> tuple[Generation, Kept | None]:
    """Answer a question; in a chat, also what `conversation` is to keep of the prompt.

    check: called before every chunk of the question and every step; may raise to stop. The cache is left as it was,
    whatever happens. Raises `PromptError`, `OptionError` or `BudgetError`.
    """
    model, template, cache, video = cached.model, cached.template, cached.cache, cached.video
    earlier = conversation.turns if user_question.chat else ()
    _, tail = template.around_video([*earlier, (user_question.prompt, None)])
    tail_ids = template.tail_ids(tail, video.last.last_times, video.last.grid.slices)
    tokens = tail_ids.shape[1]
    asked = template.question_tokens(tail, user_question.prompt) if earlier else tokens
    prompt_tokens = video.tokens + tokens
    question = Question(
        max_new_tokens=generation.new_tokens(user_question.options, model.generation_config, prompt_tokens),
        prompt_tokens=prompt_tokens,
        rows=question_rows(cache.tiers, asked),
        visual=video.is_visual(),
        looks=Looks(cache.tiers.chunk_tokens) if user_question.evidence else None,
        trace=user_question.trace,
    )
    cache.truncate(video.tokens)
    try:
        _make_room(cache, question, tokens, conversation)
        reading = _reading(cached, user_question, conversation, tail_ids, asked)
        result, kept = answer(cached, tail_ids, reading, question, user_question.options, conversation, check)
        cached.same_model.check()  # the reader of a stream may have changed the model
        if question.looks is not None:
            rows = template.question_tokens(tail, user_question.prompt)
            each = user_question.evidence == "tokens"
            evidence = collect_evidence(cached, question.looks, rows, len(result.token_ids), each)
            result = replace(result, evidence=evidence)
        if user_question.timestamps:
            result = replace(result, times=named_times(result.text, *video.last.span))
    finally:
        cache.truncate(video.tokens)
        cache.expect(CONTEXT)
    return result, kept


@dataclass(frozen=True, slots=True)
class Reading:
    """How the tokens after the video get into the cache."""

    passage: Passage | None
    """The first of them, if a conversation has kept them."""
    calls: list[Call]
    """Those of the others, by their place in the prompt."""
    keep_at: int | None
    """The length at which the conversation keeps the tokens after the video; the end of a call. None: never."""


def _reading(
    cached: CachedVideo, user_question: UserQuestion, conversation: Conversation, tail_ids: torch.Tensor, asked: int
) -> Reading:
    """asked: how many of the last tokens are the question. They are always read, as their rows are scored."""
    cache, begin = cached.cache, cached.video.tokens
    stop = begin + tail_ids.shape[1]
    if not user_question.chat:
        return Reading(None, question_calls(cache.tiers, begin, stop), None)
    passage = conversation.passage(tail_ids[0], stop - begin - asked)
    first = begin if passage is None else passage.stop
    turn = user_question.prompt
    last, turns = cached.video.last, [*conversation.turns, (turn, None)]
    if not cache.untiered.layers or cached.template.continues(turns, tail_ids, last.last_times, last.grid.slices):
        return Reading(passage, question_calls(cache.tiers, first, stop), stop)
    # A snapshot of this prompt's end would be of no use: take one before the question, in a call of its own.
    before = stop - asked
    if before - first < WORTH_A_CALL:
        return Reading(passage, question_calls(cache.tiers, first, stop), None)
    calls = context_calls(before, cache.tiers.prefill_chunk, first)
    return Reading(passage, [*calls, *question_calls(cache.tiers, before, stop)], before)


@torch.no_grad()
def answer(
    cached: CachedVideo,
    tail_ids: torch.Tensor,
    reading: Reading,
    question: Question,
    options: dict[str, Any],
    conversation: Conversation,
    check: Callable[[], None],
) -> tuple[Generation, Kept | None]:
    """Answer the prompt that ends with `tail_ids` `(1, n)`, and what is to be kept of it. The cache must hold only the
    video, with room for the prompt, and is left sealed."""
    model, template, cache, video = cached.model, cached.template, cached.cache, cached.video
    started = time.perf_counter()
    family, device = template.families[-1], model.get_input_embeddings().weight.device
    prefix, tail, kept = video.tokens, tail_ids.shape[1], conversation.kept
    options = generation.timed(options, model.generation_config)
    cache.expect(question)
    cache.device_tier.streamed_bytes = 0
    if cache.device_tier.disk is not None:
        cache.device_tier.disk.reset()
    positions = video.after(family, model, tail, family.trailing(model.config, tail_ids[0].tolist()))
    if reading.passage is not None:
        reading.passage.append_to(cache)
    with use_attention(model):
        # The question's last rows, which classify the heads, go in one call.
        for call in reading.calls:
            check()
            begin, stop = call.begin - prefix, call.stop - prefix
            embeddings = family.embed(model, tail_ids[:, begin:stop].to(device))
            hidden = family.decode(model, embeddings, positions[:, begin:stop], cache)
            if call.stop == reading.keep_at:
                kept = conversation.keep(cache, tail_ids[0, :stop])
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
        before_tail = torch.tensor([video.ids(template.visual_ids)], dtype=torch.long, device="cpu")
        prompt_ids = torch.cat((before_tail, tail_ids), dim=1).to(device)
        decoded = generation.run(model, prompt_ids, logits, step, question.max_new_tokens, options, tokenizer)
    cache.finish()
    beside = 0 if kept is None else kept.passage.nbytes
    stats = _stats(cache, video, prefix + tail, decoded, started, steps.path, beside)
    text, trace = template.text(decoded.token_ids), cache.counters.trace
    return Generation(text, decoded.token_ids, stats, trace, finish_reason=decoded.finish_reason), kept


def collect_evidence(cached: CachedVideo, looks: Looks, rows: int, tokens: int, each: bool) -> Evidence:
    """The evidence of the last answer. rows: tokens from the question on. each: also of each of its `tokens` tokens."""
    cache, video = cached.cache, cached.video
    heads = cache.shape.num_attention_heads * sum(1 + layer.readers for layer in cache.tiered_layers)
    shown, head = [], 0
    for medium in video.media:
        head += len(medium.text_ids)
        shown.append(Shown(head, medium.grid, medium.span, medium.facts.name, medium.damaged))
        head += medium.grid.tokens
    return moments.collect(looks, rows, heads, shown, tokens, each)


def _make_room(cache: TieredCache, question: Question, tail: int, conversation: Conversation) -> None:
    """Raise `BudgetError` unless both tiers can hold prompt and answer. tail: tokens after the video.

    What a conversation keeps gives way to a longer prompt. Raises `UnsupportedModelError` if prompt and answer are
    longer than the model's cache can be.
    """
    cache.long_context.check(0, question.prompt_tokens + question.max_new_tokens)
    request = Request(question.prompt_tokens, tail, question.max_new_tokens)
    shorter = "shorten the question or the conversation"
    longer = f"lower max_new_tokens, or {shorter}"
    bits = cache.device_tier.host_bits
    disk = cache.device_tier.disk
    check = partial(
        check_memory, cache.shape, cache.tiers, request, longer, shorter, bits=bits, on_disk=disk is not None
    )
    try:
        check(room=cache.room, room_bytes=cache.host_bytes, beside=conversation.nbytes)
    except BudgetError:
        if conversation.kept is None:
            raise
        check(room=cache.room, room_bytes=cache.host_bytes)
        conversation.kept = None
    if cache.room < request.tokens:
        cache.reserve(request.tokens)
    if disk is not None:
        disk.leave_memory(conversation.nbytes)


def _stats(
    cache: TieredCache,
    video: IngestedVideo,
    prompt_tokens: int,
    decoded: generation.Decoded,
    started: float,
    decode_path: str,
    beside: int,
) -> Stats:
    """beside: bytes of host memory that a conversation keeps."""
    counters, count = cache.counters, len(decoded.token_ids)
    moved = counters.warm_bytes + counters.missed_bytes + counters.prefetched_bytes + cache.device_tier.streamed_bytes
    read = DiskCounts() if cache.device_tier.disk is None else cache.device_tier.disk.counts
    later = (decoded.last_token_at - decoded.first_token_at) * 1000
    return Stats(
        prompt_tokens=prompt_tokens,
        visual_tokens=video.visual_tokens,
        new_tokens=count,
        kv_full_bytes=(prompt_tokens + count) * cache.shape.token_bytes,
        kv_cap_bytes=cache.tiers.cap_bytes,
        kv_device_peak_bytes=cache.device_tier.ledger.peak_bytes,
        kv_host_bytes=cache.host_bytes + beside,
        static_heads=counters.static_heads,
        dynamic_heads=counters.dynamic_heads,
        selected_chunks=counters.selected,
        hit_rate=counters.hit_rate,
        unseen_mass=counters.unseen_mass,
        moved_bytes=moved,
        prefetched_bytes=counters.prefetched_bytes,
        disk_read_bytes=read.read_bytes,
        disk_hit_rate=read.hit_rate,
        ingest_s=video.ingest_s,
        ttft_s=decoded.first_token_at - started,
        tpot_ms=later / (count - 1) if count > 1 else None,
        decode_path=decode_path,
        damaged=video.stats.damaged,
    )
