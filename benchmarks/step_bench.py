"""Decoding steps at a real shape: one model, one filled cache, which is sealed anew for each row.

The floor (weights alone) and transformers' full cache are captured in a graph as our step is; eager times stand beside
them. Ranks follow a script (`drift.Drift`), as keys and values are random: the hit rate is set, not found, and so is
what predictions of queries foresee. Host chunks are in 16 bits, and in rows that say so in 8 or 4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from drift import Drift, shares
from gpu_link import MISSES, copying, gather_ms
from gpu_record import Run, Values, card_state
from overlap import traced
from profiles import profile
from stock import graphed, growing_step, stock_step
from synthetic import fill, make_model, milliseconds, sealed, tiers_for

from tieredkv import TierConfig, TieredCache, use_attention
from tieredkv.cache.looks import Looks
from tieredkv.codecs import PLAIN
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import model_shape
from tieredkv.ops.select import ops_for
from tieredkv.session.step_graph import StepGraph

ROOM, ROUNDS = 64, 20


class Bench:
    """The model and the cache, made when first needed, so that a process that starts in the middle has them."""

    def __init__(self, run: Run, shape: str, tokens: int, dtype: torch.dtype) -> None:
        self.run, self.device, self.shape, self.tokens, self.dtype = run, run.device, shape, tokens, dtype
        self.rounds = 2 if run.dry else ROUNDS
        self._filled: tuple[int, TieredCache] | None = None
        self._without: dict[tuple[Any, ...], dict[str, float]] = {}
        """Of rows without copies ahead, by what else was set: milliseconds, and bytes missed in a step."""

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
        tiers, room = tiers_for(self.model, self.tokens, 0.05, host_kv_bits=bits), self.tokens + 256
        own = {"ops": self.drift.ops, "copies": self.drift.copies(self.model.device)}
        cache = TieredCache(self.model.config, tiers, max_new_tokens=ROOM, prompt_tokens=room, **own)
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
        told: Values = {}
        settings, looks = TierConfig(**tiers, host_kv_bits=bits), Looks(TierConfig().chunk_tokens) if evidence else None
        filled = self.cache(bits), self.model, self.drift
        with (
            use_attention(self.model),
            sealed(*filled, settings, hit_rate, ROOM, looks=looks, eager=eager, told=told) as steps,
        ):
            for name in ("first", "second", "third")[:warm]:
                begin = time.perf_counter()
                steps(7)
                self.run.synchronize()
                told[f"{name}_step_s"] = time.perf_counter() - begin
            yield steps, told

    def tiered(
        self,
        hit_rate: float | None,
        cap: float | None = None,
        budget_ratio: float | None = None,
        programs: int | None = None,
        bits: int = PLAIN,
        **more: Any,
    ) -> Values:
        """A row of tieredkv. cap: in GiB for a full cache of 7, as in the 7B shape; None: the whole cache's size.

        With copies ahead, shares are of the bytes missed in the row without that is otherwise the same, and stall_ms is
        the time beyond the row in which every chunk is there: None if this process has not measured that row.
        """
        gib = max(0.5, self.full_gib) if cap is None else cap * self.full_gib / 7
        floor_ms, without = self.floor_ms, self._without
        tiers = {"gpu_kv_gb": gib, "budget_ratio": budget_ratio}
        same = cap, budget_ratio, bits
        with copying(programs) as how, self.sealed(hit_rate, bits=bits, **tiers, **more) as (steps, told):
            cache = self.cache(bits)
            assert cache.decoding is not None
            plan = cache.decoding._phases[0].plan
            earlier = replace(cache.counters)
            ms = self.timed(lambda: steps(7))
            later = replace(cache.counters)
            shown = profile(self.run, lambda: steps(7))
            selected, taken = later.selected - earlier.selected, 2 * self.rounds + 2
            missed = (later.missed_bytes - earlier.missed_bytes) / taken
            copied_ahead = (later.prefetched_bytes - earlier.prefetched_bytes) / taken
            ahead: Values = {"ahead": bool(self.drift.predicted)}
            if not more.keys() - {"ahead"} and programs is None:
                counterpart = without.get((*same, hit_rate), {})
                if ahead["ahead"]:
                    ahead |= self.drift.assumed | shares(missed, copied_ahead, counterpart.get("missed"))
                else:
                    without[*same, hit_rate] = {"ms": ms, "missed": missed}
                still = without.get((*same, 1.0))
                ahead["stall_ms"] = None if still is None else ms - still["ms"]
            return {
                "ms": ms,
                "over_floor": ms / floor_ms,
                "path": steps.path,
                "scripted_hit_rate": hit_rate,
                "hit_rate": (later.resident - earlier.resident) / selected if selected else None,
                **ahead,
                "link_bytes_per_step": missed + copied_ahead,
                "ahead_bytes_per_step": copied_ahead,
                "chunks_per_head": float(plan.selected.float().mean()),
                "slots_per_head": float(plan.slots.float().mean()),
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

    def traced_ahead(self, hit_rate: float, **more: Any) -> Values:
        """What the streams do at the same time when chunks are copied ahead; the trace is left beside the record."""
        if self.run.dry:
            return {"skipped": "a CPU has no streams"}
        trace = self.run.out / "copied-ahead.json.gz"

        @contextmanager
        def steps_of(eager: bool) -> Iterator[StepGraph]:
            gib = max(0.5, self.full_gib)
            with self.sealed(hit_rate, eager=eager, warm=0, gpu_kv_gb=gib, ahead=True, **more) as (steps, _):
                yield steps

        return {"trace": trace.name, **traced(steps_of, trace)}

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
