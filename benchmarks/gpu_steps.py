"""Decoding steps at a real shape: one model, one filled cache, which is sealed anew for each row.

The floor (weights alone) and transformers' full cache are captured in a graph as our step is; eager times stand beside
them. Ranks follow a script (`synthetic.Drift`), as keys and values are random: the hit rate is set, not found. Host
chunks are in 16 bits, and in rows that say so in 8 or 4.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from gpu_link import MISSES, copying, gather_ms
from gpu_record import Fact, Run, Values, card_state
from stock import graphed, growing_step, stock_step
from synthetic import Drift, fill, make_model, milliseconds

from tieredkv import TierConfig, TieredCache, use_attention
from tieredkv.cache.looks import Looks
from tieredkv.cache.question import Question
from tieredkv.codecs import PLAIN
from tieredkv.environment.versions import cache_argument
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import model_shape
from tieredkv.ops.select import ops_for
from tieredkv.session.step_graph import StepGraph

ROOM, ROUNDS = 64, 20
EAGER_ONLY = ("everything, 8 bits", "ranked, adaptive")
"""Kinds of `Bench.exactness` that a run at full size has no time to replay; `answers` does, with a small model."""
KERNELS = 14
"""Kernels of a profile that are recorded, by time."""


def facts(run: Run) -> list[Fact]:
    bench = Bench(run, *(("tiny", 2048) if run.dry else ("7b", 131072)), run.dtype)

    def row(name: str, hit_rate: float | None, seconds: float = 40, **more: Any) -> Fact:
        return Fact(name, seconds, partial(bench.tiered, hit_rate, **more))

    def packed(bits: int, at_cap_2: Fact) -> list[Fact]:
        """The same caps and budgets with host chunks in fewer bits."""
        after = f", {bits} bits"
        return [
            Fact(f"fill{after}", 90, partial(bench.fill, bits)),
            row(f"ranked, 80 % hits{after}", 0.8, bits=bits, **budget),
            row(f"everything fits, cap 4{after}", None, cap=4.0, bits=bits),
            at_cap_2,
            Fact(f"gather from the filled tier{after}", 30, partial(bench.gather, bits)),
            Fact(f"equal to stock{after}", 40, partial(bench.exactness_of, bits)),
        ]

    budget = {"budget_ratio": 0.05}
    return [
        Fact("model", 60, bench.build),
        Fact("floor", 30, bench.floor),
        Fact("fill", 60, bench.fill),
        row("ranked, 80 % hits", 0.8, **budget),
        row("everything fits, cap 4", None, cap=4.0),
        row("ranked, 95 % hits", 0.95, **budget),
        row("ranked, 80 % hits, evidence", 0.8, evidence=True, **budget),
        row("everything fits, cap 4, evidence", None, cap=4.0, evidence=True),
        Fact("full cache", 30, bench.full),
        Fact("equal to stock", 60, bench.exactness),
        row("whatever fits, cap 2, 86 % hits", 0.86, cap=2.0, step_overhead=math.inf),
        row("defaults, cap 2, 86 % hits", 0.86, cap=2.0),
        row("ranked, 100 % hits", 1.0, **budget),
        Fact("gather from the filled tier", 30, bench.gather),
        row("ranked, 80 % hits, 48 programs", 0.8, programs=48, **budget),
        row("ranked, 80 % hits, 132 programs", 0.8, programs=132, **budget),
        row("ranked, 80 % hits, eager", 0.8, eager=True, **budget),
        *packed(8, row("whatever fits, cap 2, 86 % hits, 8 bits", 0.86, cap=2.0, bits=8, step_overhead=math.inf)),
        *packed(4, row("everything fits, cap 2, 4 bits", None, cap=2.0, bits=4)),
        Fact("full cache, static", 40, bench.static),
        Fact("full cache, offloaded", 60, bench.offloaded),
    ]


class Bench:
    """The model and the cache, made when first needed, so that a process that starts in the middle has them."""

    def __init__(self, run: Run, shape: str, tokens: int, dtype: torch.dtype) -> None:
        self.run, self.device, self.shape, self.tokens, self.dtype = run, run.device, shape, tokens, dtype
        self.rounds = 2 if run.dry else ROUNDS
        self._filled: tuple[int, TieredCache] | None = None

    @cached_property
    def model(self) -> Any:
        torch.set_grad_enabled(False)
        return make_model(self.shape, self.device, self.dtype)

    @cached_property
    def drift(self) -> Drift:
        return Drift(ops_for(torch.device(self.device)))

    @property
    def full_gib(self) -> float:
        return self.tokens * model_shape(self.model.config, self.model.dtype).token_bytes / GIB

    def cache(self, bits: int) -> TieredCache:
        """Filled with the tokens, and not sealed. One at a time: that of other bits is closed."""
        if self._filled is not None:
            if self._filled[0] == bits:
                return self._filled[1]
            self._filled[1].close()
            self._filled = None
        tiers = TierConfig(gpu_kv_gb=max(0.5, self.full_gib), budget_ratio=0.05, host_kv_bits=bits)
        room = self.tokens + 256
        cache = TieredCache(self.model.config, tiers, max_new_tokens=ROOM, prompt_tokens=room, ops=self.drift.ops)
        self._filled = bits, cache
        fill(cache, self.model, self.tokens)
        return cache

    @cached_property
    def floor_ms(self) -> float:
        """Of the captured floor; `floor` sets it, unless an earlier process did that row."""
        step, _ = graphed(stock_step(self.model, 1), self.device)
        return self.timed(step)

    def timed(self, step: Callable[[], object]) -> float:
        """Median milliseconds of a step. Some are taken first, as the clock of a card that was idle is low."""
        for _ in range(self.rounds):
            step()
        return milliseconds(step, self.rounds, self.device)

    # ---- rows

    def build(self) -> Values:
        begin = time.perf_counter()
        weights = sum(part.nbytes for part in self.model.parameters())
        self.run.synchronize()
        return {"shape": self.shape, "seconds": time.perf_counter() - begin, "weight_bytes": weights}

    def floor(self) -> Iterator[Values]:
        """The weights alone: a cache of one token."""
        step = stock_step(self.model, 1)
        replay, path = graphed(step, self.device)
        self.floor_ms = ms = self.timed(replay)
        yield {"path": path, "ms": ms, **profile(self.run, replay)}
        yield {"path": "eager: asked for", "ms": self.timed(step)}
        if not self.run.dry:
            yield {"path": "the card just after these steps", **card_state()}

    def fill(self, bits: int = PLAIN) -> Values:
        begin = time.perf_counter()
        cache = self.cache(bits)
        filled = time.perf_counter()
        locker = cache.device_tier.locker
        refusal = None if locker is None else locker.refusal()
        waited = time.perf_counter() - filled
        return {
            "tokens": self.tokens,
            "seconds": filled - begin,
            "waited_for_page_locking_s": waited,
            "refusal": refusal,
            "host_bytes": cache.host_bytes,
            "host_kv_bits": bits,
        }

    @contextmanager
    def sealed(
        self,
        hit_rate: float | None,
        evidence: bool = False,
        eager: bool = False,
        warm: int = 3,
        bits: int = PLAIN,
        **tiers: Any,
    ) -> Iterator[tuple[StepGraph, Values]]:
        """Seal the filled cache and take `warm` steps: the first compiles, the second is captured.

        hit_rate: scripted; None: ranks are the real ones.
        """
        cache, c = self.cache(bits), TierConfig().chunk_tokens
        looks = Looks(c) if evidence else None
        cache.truncate(self.tokens)
        cache.set_tiers(TierConfig(**tiers, host_kv_bits=bits))
        cache.expect(Question(max_new_tokens=ROOM, rows=32, looks=looks))
        self.run.synchronize()
        begin = time.perf_counter()
        cache.seal()
        self.run.synchronize()
        told: Values = {"seal_s": time.perf_counter() - begin}
        self.drift.begin(cache, hit_rate)

        def forward(token: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
            return self.model(token, **cache_argument(cache), position_ids=place).logits[:, -1]

        try:
            with use_attention(self.model):
                steps = StepGraph(forward, cache, self.model.device, axes=1, position=self.tokens)
                if eager:
                    steps.path = "eager: asked for"
                for name in ("first", "second", "third")[:warm]:
                    begin = time.perf_counter()
                    steps(7)
                    self.run.synchronize()
                    told[f"{name}_step_s"] = time.perf_counter() - begin
                yield steps, told
        finally:
            self.run.synchronize()
            cache.truncate(self.tokens)

    def tiered(
        self,
        hit_rate: float | None,
        cap: float | None = None,
        budget_ratio: float | None = None,
        programs: int | None = None,
        bits: int = PLAIN,
        **more: Any,
    ) -> Values:
        """A row of tieredkv. cap: in GiB for a full cache of 7, as in the 7B shape; None: the whole cache's size."""
        gib = max(0.5, self.full_gib) if cap is None else cap * self.full_gib / 7
        floor_ms = self.floor_ms
        tiers = {"gpu_kv_gb": gib, "budget_ratio": budget_ratio}
        with copying(programs) as how, self.sealed(hit_rate, bits=bits, **tiers, **more) as (steps, told):
            cache = self.cache(bits)
            assert cache.decoding is not None
            plan = cache.decoding._phases[0].plan
            earlier = replace(cache.counters)
            ms = self.timed(lambda: steps(7))
            later = replace(cache.counters)
            shown = profile(self.run, lambda: steps(7))
            selected = later.selected - earlier.selected
            return {
                "ms": ms,
                "over_floor": ms / floor_ms,
                "path": steps.path,
                "scripted_hit_rate": hit_rate,
                "hit_rate": (later.resident - earlier.resident) / selected if selected else None,
                "link_bytes_per_step": (later.missed_bytes - earlier.missed_bytes) / (2 * self.rounds + 2),
                "chunks_per_head": float(plan.selected.float().mean()),
                "ranked": plan.ranked,
                "limited_by": plan.bound,
                "host_kv_bits": bits,
                "page_bits": plan.page_bits,
                "gpu_kv_gb": gib,
                "device_bytes": cache.ledger.used_bytes,
                **how,
                **told,
                **shown,
            }

    def full(self) -> Iterator[Values]:
        """transformers' own cache on the card, with sdpa."""
        step = stock_step(self.model, self.tokens)
        ms = self.timed(step)
        yield {"path": "eager", "ms": ms, "over_floor": ms / self.floor_ms, **profile(self.run, step)}
        replay, path = graphed(step, self.device)
        ms = self.timed(replay)
        yield {"path": path, "ms": ms, "over_floor": ms / self.floor_ms, **profile(self.run, replay)}

    def static(self) -> Values:
        """transformers' static cache, captured in a graph."""
        from transformers import StaticCache

        cache: Any = StaticCache(config=self.model.config, max_cache_len=self.tokens + 64)
        step = stock_step(self.model, self.tokens, cache)
        replay, path = graphed(step, self.device)
        ms = self.timed(replay)
        return {"path": path, "ms": ms, "over_floor": ms / self.floor_ms, **profile(self.run, replay)}

    def offloaded(self) -> Values:
        """transformers' offloaded cache: every layer's keys and values cross the link at every step."""
        if self.run.dry:
            return {"skipped": "needs a card's streams"}
        ms = milliseconds(growing_step(self.model, self.tokens, "offloaded"), 2, self.device)
        return {"path": "eager", "ms": ms, "over_floor": ms / self.floor_ms}

    def gather(self, bits: int = PLAIN) -> Iterator[Values]:
        """The misses of a step, layer by layer, from all of the page-locked host tier."""
        hosts = [layer.host for layer in self.cache(bits).tiered_layers if layer.host is not None]
        piece = hosts[0].codec.chunk_bytes
        for programs in (12, 24, 48, 96):
            for pieces in MISSES:
                with copying(programs) as how:
                    ms, path = gather_ms(self.run, hosts, pieces, min(bits, 8), launches=len(hosts))
                rate = pieces * piece / ms / 1e6
                yield {**how, "pieces": pieces, "piece_bytes": piece, "gb_s": rate, "us": 1000 * ms, "path": path}

    def exactness(self, eager_only: tuple[str, ...] = EAGER_ONLY) -> Iterator[Values]:
        """Logits of a step that attends to everything beside those of transformers' full cache; graph beside eager."""
        from transformers import StaticCache

        stock_logits = stock_step(self.model, self.tokens)().float()
        fixed = StaticCache(config=self.model.config, max_cache_len=self.tokens + 64)
        by_static = stock_step(self.model, self.tokens, fixed)().float()
        # The yardstick: how far apart two ways of transformers' own are, in this dtype.
        yield {"kind": "transformers' static cache", "eager_to_stock": differences(by_static, stock_logits)}
        del fixed
        full = {"gpu_kv_gb": 1.3 * self.full_gib + 0.2}
        kinds: dict[str, Values] = {
            "everything, 16 bits": {**full, "pack_pages": False},
            "everything, 8 bits": {"gpu_kv_gb": 4 * self.full_gib / 7},
            "ranked": {**full, "budget_ratio": 0.05},
            "ranked, adaptive": {**full, "budget_ratio": 0.05, "adaptive": True},
        }
        for kind, tiers in kinds.items():
            yield self._beside(stock_logits, kind, kind not in eager_only, **tiers)

    def exactness_of(self, bits: int) -> Values:
        """Logits of a step that attends to everything in so many bits beside those of transformers' full cache."""
        stock_logits = stock_step(self.model, self.tokens)().float()
        kind = f"everything, host chunks in {bits} bits"
        return self._beside(stock_logits, kind, True, bits=bits, gpu_kv_gb=1.3 * self.full_gib + 0.2)

    def _beside(self, stock_logits: torch.Tensor, kind: str, replayed: bool, **tiers: Any) -> Values:
        rows = {}
        for eager in (True, False) if replayed else (True,):
            with self.sealed(None, eager=eager, warm=0, **tiers) as (steps, _):
                rows[eager] = torch.stack([steps(7).float().flatten().clone() for _ in range(5)])
                path = steps.path
        row: Values = {"kind": kind, "eager_to_stock": differences(rows[True][0], stock_logits), "path": path}
        if replayed:
            row["graph_to_eager"] = differences(rows[False], rows[True])
        return row


def differences(got: torch.Tensor, want: torch.Tensor) -> Values:
    """How far logits `(..., vocabulary)` are apart."""
    off = (got - want).abs()
    return {
        "largest": float(off.max()),
        "mean": float(off.mean()),
        "std_of_logits": float(want.std()),
        "same_tokens": bool((got.argmax(-1) == want.argmax(-1)).all()),
        "finite": bool(got.isfinite().all()),
    }


# ---- profiles


def profile(run: Run, step: Callable[[], object], rounds: int = 4) -> Values:
    """Time and launches of a step's kernels: all together, and by kernel, the slowest first. rounds: how many steps."""
    activity = torch.profiler.ProfilerActivity.CPU if run.dry else torch.profiler.ProfilerActivity.CUDA
    rounds = 1 if run.dry else rounds
    with torch.profiler.profile(activities=[activity]) as profiled:
        for _ in range(rounds):
            step()
        run.synchronize()
    spent: dict[str, tuple[float, int]] = {}
    for event in profiled.key_averages():
        took = event.self_cpu_time_total if run.dry else event.self_device_time_total
        if took > 0:
            us, launches = spent.get(short(event.key), (0.0, 0))
            spent[short(event.key)] = us + took, launches + event.count
    slowest = sorted(spent.items(), key=lambda item: -item[1][0])[:KERNELS]
    return {
        "kernel_us": sum(us for us, _ in spent.values()) / rounds,
        "launches": sum(launches for _, launches in spent.values()) / rounds,
        "kernels": [[name, us / rounds, launches / rounds] for name, (us, launches) in slowest],
    }


def short(name: str) -> str:
    """A kernel's name without namespaces and types, but with the function that a generic one applies."""
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    head = re.split(r"[<(]", plain)[0].split("::")[-1]
    applied = re.findall(r"(\w*(?:[Ff]unctor|_kernel_cuda|_kernel_impl|Op)\w*)", plain[len(head) :])
    return (head if not applied or applied[0] == head else f"{head}:{applied[0]}")[:60]
