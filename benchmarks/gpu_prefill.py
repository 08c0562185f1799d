"""Prefill of a real shape at the shipped call size, beside one stock call over the whole prompt; then a question.

Of the question: its own call, the seal, and the first steps. The second question shows what stays once all kernels are
compiled.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import torch
from gpu_record import Fact, Run, Values
from prefill import stock, timed
from synthetic import make_model

from tieredkv import TierConfig, TieredCache, use_attention
from tieredkv.cache.question import CONTEXT, Question
from tieredkv.environment.versions import cache_argument
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import model_shape
from tieredkv.session.step_graph import StepGraph

QUESTION_TOKENS = 32


def facts(run: Run) -> list[Fact]:
    prompts = Prompts(run)
    short, long = (512, 1024) if run.dry else (32768, 131072)
    return [
        Fact("model", 60, prompts.build),
        Fact("in calls, all of it on the card", 40, partial(prompts.tiered, short, None)),
        Fact("one stock call", 30, partial(prompts.stock, short)),
        Fact("in calls, cap 0.5", 40, partial(prompts.tiered, short, 0.5)),
        Fact("long, in calls, cap 4", 60, partial(prompts.tiered, long, 4.0)),
        Fact("long, one stock call", 40, partial(prompts.stock, long)),
    ]


class Prompts:
    """One model; prompts of random tokens."""

    def __init__(self, run: Run) -> None:
        self.run, self.device = run, run.device

    @cached_property
    def model(self) -> Any:
        torch.set_grad_enabled(False)
        return make_model("tiny" if self.run.dry else "7b", self.device, self.run.dtype)

    def build(self) -> Values:
        """The model, and a short prompt, so that kernels are compiled and libraries loaded."""
        tokens = 256 if self.run.dry else 4096
        stock(self.model, self.ids(tokens))
        for _ in self._calls(tokens, TierConfig(gpu_kv_gb=1.0)):
            pass
        return {"tokens": tokens}

    def ids(self, tokens: int) -> torch.Tensor:
        return torch.randint(100, (1, tokens), device=self.device)

    def stock(self, tokens: int) -> Values:
        row = timed(lambda: stock(self.model, self.ids(tokens)), self.device)
        return {"tokens": tokens, "tokens_per_s": tokens / row["seconds"] if "seconds" in row else None, **row}

    def tiered(self, tokens: int, cap: float | None) -> Iterator[Values]:
        """The context in calls, then two questions. cap: in GiB; None: more than the whole cache."""
        full = tokens * model_shape(self.model.config, self.model.dtype).token_bytes / GIB
        tiers = TierConfig(gpu_kv_gb=max(0.2, 1.2 * full) if cap is None else cap)
        yield from self._calls(tokens, tiers)

    def _calls(self, tokens: int, tiers: TierConfig) -> Iterator[Values]:
        model, run = self.model, self.run
        begin = time.perf_counter()

        def lap() -> float:
            nonlocal begin
            run.synchronize()
            took, begin = time.perf_counter() - begin, time.perf_counter()
            return took

        if not run.dry:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        room = tokens + QUESTION_TOKENS + 64
        with use_attention(model), TieredCache(model.config, tiers, prompt_tokens=room, max_new_tokens=32) as cache:
            cache.expect(CONTEXT)
            first_call, shown, parts = 0.0, {}, self.ids(tokens).split(tiers.prefill_chunk, dim=1)
            for index, part in enumerate(parts):

                def call(part: torch.Tensor = part) -> None:
                    model(part, **cache_argument(cache), logits_to_keep=1)

                call()
                if index == 0:
                    first_call = lap()
            cache.device_tier.copies.drain()
            rest = lap()
            cache.settle()
            settle_s = lap()
            row: Values = {
                "tokens": tokens,
                "call_tokens": tiers.prefill_chunk,
                "gpu_kv_gb": tiers.gpu_kv_gb,
                "host_bits": cache.device_tier.host_bits,
                "seconds": first_call + rest,
                "first_call_s": first_call,
                "settle_s": settle_s,
                "tokens_per_s": tokens / (first_call + rest),
                "streamed_bytes": cache.device_tier.streamed_bytes,
            }
            if not run.dry:
                row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            yield {**row, **shown}
            for number in (1, 2):
                yield {"question": number, **self._question(cache, tokens, lap)}

    def _question(self, cache: TieredCache, tokens: int, lap: Any) -> Values:
        model, stop = self.model, tokens + QUESTION_TOKENS
        cache.truncate(tokens)
        cache.expect(Question(max_new_tokens=32, prompt_tokens=stop, rows=QUESTION_TOKENS))
        told: Values = {"truncate_s": lap()}
        model(self.ids(QUESTION_TOKENS), **cache_argument(cache), logits_to_keep=1)
        told["question_call_s"] = lap()
        cache.seal()
        told["seal_s"] = lap()

        def forward(token: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
            return model(token, **cache_argument(cache), position_ids=place).logits[:, -1]

        steps = StepGraph(forward, cache, model.device, axes=1, position=stop)
        for name in ("first", "second", "third"):
            steps(7)
            told[f"{name}_step_s"] = lap()
        told |= {"path": steps.path, "static_heads": cache.counters.static_heads}
        told["hit_rate"] = cache.counters.hit_rate
        return told
