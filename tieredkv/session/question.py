"""One question answered: its tokens prefilled behind the video's, the cache sealed, the answer decoded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tieredkv.cache.question import Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.evidence import moments
from tieredkv.evidence.moments import Evidence
from tieredkv.models.chat_template import ChatTemplate
from tieredkv.models.families.base import Positions, VideoGrid
from tieredkv.models.switch import use_attention
from tieredkv.planning.admission import Request, check_memory
from tieredkv.planning.prefill_plan import question_calls
from tieredkv.session import generation
from tieredkv.session.results import Generation, Stats
from tieredkv.session.step_graph import Steps


@dataclass(frozen=True, slots=True)
class VideoPrompt:
    """What the prompts of all questions about one video begin with."""

    template: ChatTemplate
    head: str
    """What the chat template writes before the video."""
    head_ids: torch.Tensor
    """`(1, n)`: all before the first step."""
    video: VideoGrid
    positions: Positions
    start: float
    """Seconds into the file of the first frame."""
    end: float
    """Where the last frame ends."""

    @property
    def head_tokens(self) -> int:
        return self.head_ids.shape[1]

    @property
    def tokens(self) -> int:
        return self.head_tokens + self.video.tokens

    def is_visual(self) -> torch.Tensor:
        """Which tokens are visual, `(tokens,)`."""
        return torch.cat((torch.zeros(self.head_tokens, dtype=torch.bool, device="cpu"), self.video.is_visual()))

    def ids(self, tail_ids: torch.Tensor) -> torch.Tensor:
        """Token ids `(1, n)` of a whole prompt, as the model's processor writes it. tail_ids: all after the video."""
        inside = torch.tensor([self.video.ids(self.template.visual_id)], dtype=torch.long, device="cpu")
        return torch.cat((self.head_ids, inside, tail_ids), dim=1)

    def question_tokens(self, tail: str, question: str) -> int:
        """Tokens of the prompt from its last question on. tail: its text after the video."""
        mark = "(the question)"
        behind = self.template.around_video([(mark, None)])[1].rpartition(mark)[2]
        begin = tail.rfind(question.strip(), 0, len(tail) - len(behind))
        return self.template.tokenize(tail[max(0, begin) :]).shape[1]


@torch.no_grad()
def answer(
    model: Any,
    prompt: VideoPrompt,
    cache: TieredCache,
    tail_ids: torch.Tensor,
    question: Question,
    options: dict[str, Any],
    check: Callable[[], None],
    ingest_s: float,
) -> Generation:
    """Answer what follows the video in a prompt; the cache holds the video and nothing more, and is left sealed.

    tail_ids: `(1, n)`. question: what the cache must know of them. options: transformers' generation options. check:
    called before every chunk of the question and every step; may raise to stop. ingest_s: for the statistics. Raises
    `BudgetError`.
    """
    started, options = time.perf_counter(), generation.timed(options, model.generation_config)
    family, device, tiers = prompt.template.family, model.get_input_embeddings().weight.device, cache.tiers
    prefix, tail = prompt.tokens, tail_ids.shape[1]
    _make_room(cache, prefix, tail, question)
    cache.expect(question)
    cache.device_tier.transfer.reset()
    positions = family.positions(model, prompt.head_tokens, prompt.video, prefix, prefix + tail, prompt.positions)
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
            return family.logits(model, hidden[:, -1]).to(device)  # of several cards, from the last to the first

        # Generated tokens go on after the prompt, on all axes alike.
        steps = Steps(forward, cache, device, positions.shape[0], int(positions[0, -1]) + 1)

        def step(token: int) -> torch.Tensor:
            check()
            return steps(token)

        tokenizer = prompt.template.processor.tokenizer
        prompt_ids = prompt.ids(tail_ids).to(device)
        decoded = generation.run(model, prompt_ids, logits, step, question.max_new_tokens, options, tokenizer)
    cache.finish()
    stats = _stats(cache, prompt.video, prefix + tail, decoded, started, ingest_s, steps.path)
    return Generation(prompt.template.text(decoded.token_ids), decoded.token_ids, stats, cache.counters.trace)


def looked_at(prompt: VideoPrompt, cache: TieredCache, rows: int, tokens: int, each: bool) -> Evidence:
    """The evidence of an answer of `tokens` tokens that has just been made. rows: tokens from the question on."""
    looks = cache.question.looks
    assert looks is not None
    heads = cache.shape.num_attention_heads * cache.shape.num_layers
    span = prompt.start, prompt.end
    return moments.collect(looks, rows, heads, prompt.head_tokens, prompt.video, span, tokens, each)


def _make_room(cache: TieredCache, prefix: int, tail: int, question: Question) -> None:
    """Raise `BudgetError` unless both tiers hold a question of `tail` tokens behind `prefix` others, and its answer."""
    request = Request(prefix + tail, tail, question.max_new_tokens)
    shorter = "shorten the question or the conversation"
    longer = f"lower max_new_tokens, or {shorter}"
    check_memory(cache.shape, cache.tiers, request, longer, shorter, room=cache.room, room_bytes=cache.host_bytes)
    if cache.room < request.tokens:
        cache.reserve(request.tokens)


def _stats(
    cache: TieredCache,
    video: VideoGrid,
    prompt_tokens: int,
    decoded: generation.Decoded,
    started: float,
    ingest_s: float,
    path: str,
) -> Stats:
    counters, count = cache.counters, len(decoded.token_ids)
    streamed = cache.device_tier.transfer.streamed_bytes
    moved = counters.warm_bytes + counters.missed_bytes + counters.prefetched_bytes + streamed
    later = (decoded.last_token_at - decoded.first_token_at) * 1000
    return Stats(
        prompt_tokens=prompt_tokens,
        visual_tokens=video.visual_tokens,
        new_tokens=count,
        kv_full_bytes=(prompt_tokens + count) * cache.shape.token_bytes,
        kv_cap_bytes=cache.tiers.cap_bytes,
        kv_device_peak_bytes=cache.ledger.peak_bytes,
        kv_host_bytes=cache.host_bytes,
        static_heads=counters.static_heads,
        dynamic_heads=counters.dynamic_heads,
        selected_chunks=counters.selected,
        hit_rate=counters.hit_rate,
        unseen_mass=counters.unseen_mass,
        moved_bytes=moved,
        prefetched_bytes=counters.prefetched_bytes,
        ingest_s=ingest_s,
        ttft_s=decoded.first_token_at - started,
        tpot_ms=later / (count - 1) if count > 1 else None,
        decode_path=path,
    )
