"""Prefill of a real shape at the shipped call size, beside one stock call over the whole prompt; then a question.

Single calls tell where the time goes: the host's part, the kernels', and what passes between them. Of the question: its
own call, the seal, and the first steps. The second question shows what stays once all kernels are compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
from gpu_record import Fact, Run, Values
from prefill import stock, timed
from profiles import profile
from synthetic import make_model, milliseconds

from tieredkv import TierConfig, TieredCache, use_attention
from tieredkv.attention import exact
from tieredkv.cache.context_digests import FIT_TOKENS
from tieredkv.cache.question import CONTEXT, Question
from tieredkv.environment.threads import at_most
from tieredkv.environment.versions import cache_argument
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import model_shape
from tieredkv.planning.sizes import digest_for
from tieredkv.session.step_graph import StepGraph

QUESTION_TOKENS = 32


def facts(run: Run) -> list[Fact]:
    prompts = Prompts(run)
    short, long = (512, 1024) if run.dry else (32768, 131072)
    return [
        Fact("model", 60, prompts.build),
        Fact("single calls, all of it on the card", 30, partial(prompts.single_calls, short, None)),
        Fact("in calls, all of it on the card", 40, partial(prompts.tiered, short, None)),
        Fact("one stock call", 30, partial(prompts.stock, short)),
        Fact("single calls, cap 0.5", 30, partial(prompts.single_calls, short, 0.5)),
        Fact("attention alone", 15, partial(prompts.attention, short)),
        Fact("a fit of digests on the host", 10, prompts.fit),
        Fact("in calls, cap 0.5", 40, partial(prompts.tiered, short, 0.5)),
        Fact("long, in calls, cap 4", 60, partial(prompts.tiered, long, 4.0)),
        Fact("long, one stock call", 40, partial(prompts.stock, long)),
        Fact("in calls of 8,192, all of it on the card", 30, partial(prompts.tiered, short, None, 8192)),
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

    def _tiers(self, tokens: int, cap: float | None, **options: Any) -> TierConfig:
        """cap: in GiB; None: more than the whole cache."""
        full = tokens * model_shape(self.model.config, self.model.dtype).token_bytes / GIB
        return TierConfig(gpu_kv_gb=max(0.2, 1.2 * full) if cap is None else cap, **options)

    def tiered(self, tokens: int, cap: float | None, call_tokens: int | None = None) -> Iterator[Values]:
        """The context in calls, then two questions."""
        size = {} if call_tokens is None else {"prefill_chunk": call_tokens}
        yield from self._calls(tokens, self._tiers(tokens, cap, **size))

    # ---- where the time goes

    def single_calls(self, tokens: int, cap: float | None) -> Iterator[Values]:
        """One call at the start of a prompt, and the last two of one: one timed, one profiled."""
        tiers = self._tiers(tokens, cap)
        n = tiers.prefill_chunk if not self.run.dry else tokens // 8
        for number in range(2):  # of prompts of two calls, whose host tier is locked at once
            with self._context(2 * n, tiers) as cache:
                yield self._one(cache, n, profiled=number == 1)
        with self._context(tokens, tiers) as cache:
            begin, parts = time.perf_counter(), tokens // n
            for _ in range(parts - 2):
                self._call(cache, n)
            issued = time.perf_counter() - begin
            self.run.synchronize()
            yield {
                "calls": parts - 2,
                "host_s": issued,
                "seconds": time.perf_counter() - begin,
                "page_locking_refused": None
                if cache.device_tier.locker is None
                else cache.device_tier.locker.refusal(),
            }
            for profiled in (False, True):
                yield self._one(cache, n, profiled)

    def _context(self, tokens: int, tiers: TierConfig) -> TieredCache:
        cache = TieredCache(self.model.config, tiers, prompt_tokens=tokens)
        cache.expect(CONTEXT)
        return cache

    def _call(self, cache: TieredCache, tokens: int) -> None:
        with use_attention(self.model):
            self.model(self.ids(tokens), **cache_argument(cache), logits_to_keep=1)

    def _one(self, cache: TieredCache, tokens: int, profiled: bool) -> Values:
        """A call, timed or profiled. `host_ms`: until all was queued; what is left of `ms` the host waited."""
        run, tier = self.run, cache.device_tier
        told: Values = {"past": cache.get_seq_length(), "call_tokens": tokens, "gpu_kv_gb": cache.tiers.gpu_kv_gb}
        streamed = tier.streamed_bytes
        run.synchronize()
        begin, times = time.perf_counter(), []

        def call() -> None:
            self._call(cache, tokens)
            times.append(time.perf_counter() - begin)

        shown = profile(run, call, rounds=1) if profiled else {}
        if not profiled:
            call()
        tier.copies.drain()
        run.synchronize()
        if not profiled:  # a profiler slows the host
            told |= {"host_ms": 1e3 * times[0], "ms": 1e3 * (time.perf_counter() - begin)}
        return {**told, "streamed_bytes": tier.streamed_bytes - streamed, **shown}

    def attention(self, tokens: int) -> Iterator[Values]:
        """The attention of one call of one layer, at the start and the end of a prompt, by each of torch's kernels."""
        config, n = self.model.config, 256 if self.run.dry else TierConfig().prefill_chunk
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        d = config.hidden_size // heads
        for past in (0, tokens - n):
            query = torch.randn((1, heads, n, d), dtype=self.run.dtype, device=self.device)
            keys = torch.randn((1, kv_heads, past + n, d), dtype=self.run.dtype, device=self.device)
            flops = 4 * heads * d * n * (past + n / 2)
            for name, work in self._kernels(query, keys).items():
                row: Values = {"kernel": name, "past": past, "call_tokens": n}
                try:
                    ms = milliseconds(work, 2 if self.run.dry else 10, self.device)
                    yield {**row, "ms": ms, "tflops": flops / ms / 1e9}
                except RuntimeError as error:  # a kernel that does not take it
                    yield {**row, "refused": str(error).splitlines()[0][:200]}

    def _kernels(self, query: torch.Tensor, keys: torch.Tensor) -> dict[str, Callable[[], object]]:
        """Attention with its log-sum-exp; of cuDNN without a mask, as it aligns one to the first key."""
        if self.run.dry:
            return {"tieredkv": lambda: exact.attend(query[0], keys[0], keys[0], 0.1, causal=True)}
        repeated = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        return {
            "tieredkv": lambda: exact.attend(query[0], keys[0], keys[0], 0.1, causal=True),
            "cudnn, no mask": lambda: cudnn(query, keys, keys, None, True, 0.0, False, False, scale=0.1),
            "cudnn, no mask, repeated": lambda: cudnn(
                query, repeated, repeated, None, True, 0.0, False, False, scale=0.1
            ),
            "flash, no mask": lambda: exact.attend(query[0], keys[0], keys[0], 0.1, causal=False),
        }

    def fit(self) -> Iterator[Values]:
        """What a layer's fit takes beside the card, by threads."""
        shape = model_shape(self.model.config, self.model.dtype)
        digest = digest_for(shape, TierConfig())
        keys = torch.randn((shape.num_key_value_heads, FIT_TOKENS, shape.head_dim), dtype=torch.float32, device="cpu")
        for threads in (torch.get_num_threads(), 1):
            with at_most(threads):
                digest.fit(keys.mT @ keys, keys)
                begin = time.perf_counter()
                digest.fit(keys.mT @ keys, keys)
                yield {"threads": threads, "ms": 1e3 * (time.perf_counter() - begin), "layers": shape.num_layers}

    # ---- a whole prompt

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
