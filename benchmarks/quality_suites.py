"""Suites of `quality.py`: contexts, and the settings under which each is measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from quality_report import AS_MADE_LABEL, FULL

SUITES = ("video", "hybrid", "text", "ablations", "sweeps", "bits", "rounding")
PRESETS = ("paper", "mixkv", "snapkv", "lookm", "streaming", "quest", "arkvale")
BUDGETS = (0.05, 0.1, 0.2)
CHUNK = 8
AS_MADE: dict[str, Any] = {"pack_pages": False}
"""Pages in the model's dtype, so that rows differ only in what their label says."""

PACKED_PAST: dict[str, Any] = {"gpu_kv_gb": 0.002, "prefill_chunk": 512}
"""So little that next to no token stays on the device: each call attends to the past as the host tier holds it."""


@dataclass(frozen=True)
class Unit:
    """One context, its questions and their settings."""

    model: str
    task: str
    """Always "video" for the video model: all tasks of a video are one unit."""
    tokens: int
    number: int
    questions: int
    chunk_tokens: int
    settings: tuple[tuple[str, str], ...]
    """(label, JSON of settings as `settings.tier_config` takes them)."""
    unsealed: bool = False
    """Also ask second questions without sealing again."""
    read_with: str = "{}"
    """JSON of settings for reading the context and scoring the questions' rows, which a seal cannot change."""
    at_once: bool = False
    """Full caches take the tokens of an answer in one call, unrounded, as a prompt; on text only."""

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def grid() -> tuple[tuple[str, str], ...]:
    """The full cache once, and every preset at every budget, with unpacked pages as in the papers."""
    pairs: list[tuple[str, dict[str, Any]]] = [(FULL, {"policy": FULL})]
    pairs += [(AS_MADE_LABEL, {"policy": "hybridkv", "budget_ratio": one, **AS_MADE}) for one in (0.025, *BUDGETS)]
    pairs += [(name, {"policy": name, "budget_ratio": one, **AS_MADE}) for name in PRESETS for one in BUDGETS]
    return tuple((label, json.dumps(one)) for label, one in pairs)


def shipped() -> tuple[tuple[str, str], ...]:
    """The default, with pages of 8 bits; compared with the full cache of `grid`."""
    return tuple(("hybridkv", json.dumps({"policy": "hybridkv", "budget_ratio": one})) for one in BUDGETS)


def bits(budgets: Iterable[float]) -> tuple[tuple[str, str], ...]:
    """The exact full cache, and host tiers of 16, 8 and 4 bits, read in that many bits: at every budget, and whole."""
    pairs: list[tuple[str, dict[str, Any]]] = [(FULL, {"policy": FULL, "host_kv_bits": 16})]
    for count in (16, 8, 4):
        pairs += [] if count == 16 else [(f"{count} bits", {"policy": FULL, "host_kv_bits": count})]
        pairs += [(f"{count} bits", {"budget_ratio": one, "host_kv_bits": count, **AS_MADE}) for one in budgets]
    return tuple((label, json.dumps(one)) for label, one in pairs)


def decoded() -> tuple[tuple[str, str], ...]:
    """Full caches that are decoded step by step, so that the answer's own tokens are rounded too."""
    pairs = {f"{count} bits, decoded": {"policy": FULL, "host_kv_bits": count} for count in (8, 4)}
    return tuple((label, json.dumps({**fields, "decoded": True})) for label, fields in pairs.items())


def exact_past() -> tuple[tuple[str, str], ...]:
    """Host tiers that are packed only after the context was read."""
    pairs = {f"{count} bits, packed after reading": {"policy": FULL, "host_kv_bits": count} for count in (8, 4)}
    return tuple((label, json.dumps({**fields, "exact_past": True})) for label, fields in pairs.items())


def variants(
    budgets: Iterable[float], named: dict[str, dict[str, Any]], full: bool = True
) -> tuple[tuple[str, str], ...]:
    """Named variants of hybridkv at every budget. full: also the full cache, unless another set has it."""
    pairs = [(FULL, {"policy": FULL})] if full else []
    for label, fields in named.items():
        pairs += [(label, {"budget_ratio": budget, **fields, **AS_MADE}) for budget in budgets]
    return tuple((label, json.dumps(one)) for label, one in pairs)


ABLATIONS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "all static": {"theta": 0.0},
    "all dynamic": {"theta": 2.0},
    "without head level": {"dynamic_floor": 1.0},
    "heads by the paper's score": {"head_score": "mass", "theta": 0.9},
    "same, without head level": {"head_score": "mass", "theta": 0.9, "static_weight": "even", "static_floor": 1.0},
    "paper": {"policy": "paper"},
    "paper, without head level": {"policy": "paper", "static_weight": "even", "static_floor": 1.0},
    "paper, all static": {"policy": "paper", "theta": 0.0},
    "paper, all dynamic": {"policy": "paper", "theta": 2.0},
}
SWEEPS: dict[str, dict[str, dict[str, Any]]] = {
    "theta": {f"theta {value}": {"theta": value} for value in (0.9, 0.95, 0.98, 0.99, 2.0)},
    "paper's theta": {f"paper, theta {value}": {"policy": "paper", "theta": value} for value in (0.5, 0.7, 0.9, 2.0)},
    "r": {f"paper, r {value}": {"policy": "paper", "type_split": value} for value in (0.6, 0.8, 1.0)},
    "weight": {
        f"paper, by {value}": {"policy": "paper", "static_weight": value} for value in ("need", "score", "even")
    },
    "floor": {f"dynamic floor {value}": {"dynamic_floor": value} for value in (0.0, 0.3, 0.6, 1.0)},
    "digest": {
        f"digest {kind}, {bits} bits": {"digest": kind, "digest_bits": bits}
        for kind in ("mean", "minmax", "cuboid", "segment", "sketch")
        for bits in (4, 8)
    },
    "group": {f"group {value}": {"chunk_group": value, "stay": 1.0} for value in ("mean", "max", "max_logit")},
    "stay": {f"stay {value}": {"stay": value} for value in (1.0, 2.0, 4.0, 8.0)},
    "dense": {f"dense layers {value}": {"dense_layers": value} for value in (0, 1, 2)},
    "reuse": {f"reuse above {value}": {"reuse_above": value} for value in (0.0, 0.8, 0.9, 2.0)},
}


def units(suite: str, quick: bool) -> list[Unit]:
    """The contexts of a suite, the shortest first."""
    result: list[Unit] = []

    def add(model: str, task: str, tokens: int, settings: Any, asked: int, each: int, **more: Any) -> None:
        contexts = 1 if quick else math.ceil(asked / each)
        chunk = more.pop("chunk_tokens", CHUNK)
        result.extend(
            Unit(model, task, tokens, number, 2 if quick else each, chunk, settings, **more)
            for number in range(contexts)
        )

    if suite == "video":
        for tokens in (2048, 4096, 8192):
            for settings in (grid(), shipped()):
                add("tiny", "video", tokens, settings, 200, 8, unsealed=tokens == 4096)
    if suite == "hybrid":
        for tokens in (2048, 4096):
            for settings in (grid(), shipped()):
                add("tiny-hybrid", "video", tokens, settings, 200, 8, unsealed=tokens == 4096)
    if suite == "text":
        for settings in (grid(), shipped()):
            for task in ("chain", "lookup", "copy", "needle"):
                add("smollm2", task, 4096, settings, 200, 20)
            add("smollm2", "perplexity", 4096, settings, 6, 1)
    if suite == "bits":
        more = {"read_with": json.dumps(PACKED_PAST)}
        for tokens in (2048, 4096):
            add("tiny", "video", tokens, bits(BUDGETS), 200, 8, **more)
        for task in ("chain", "lookup", "copy", "needle"):
            add("smollm2", task, 2048, bits(BUDGETS), 200, 10, at_once=True, **more)
    if suite == "rounding":
        more = {"read_with": json.dumps(PACKED_PAST), "at_once": True}
        for tokens in (2048, 4096):
            add("smollm2", "perplexity", tokens, (*bits(()), *decoded(), *exact_past()), 20, 1, **more)
        for task in ("chain", "lookup", "copy", "needle"):
            add("smollm2", task, 2048, (*bits(()), *decoded()), 200, 10, **more)
    if suite == "ablations":
        add("tiny", "video", 2048, variants((0.05, 0.1), ABLATIONS), 200, 8)
        add("smollm2", "chain", 2048, variants((0.05, 0.1), ABLATIONS), 96, 8)
    if suite == "sweeps":
        every = {label: fields for named in SWEEPS.values() for label, fields in named.items()}
        add("tiny", "video", 2048, variants((0.05,), every), 96, 8)
        add("smollm2", "chain", 2048, variants((0.05,), every), 48, 8)
        for ratio in (0.001, 0.01, 0.05, 0.2):
            fields = {"policy": "paper", "top_k_ratio": ratio}
            more = {"read_with": json.dumps(fields)}
            named = {f"paper, k {ratio:.1%}": fields}
            add("tiny", "video", 2048, variants((0.05,), named, full=False), 96, 8, **more)
            add("smollm2", "chain", 2048, variants((0.05,), named, full=False), 48, 8, **more)
        for chunk in (4, 16, 32, 64):  # 8 is that of all others
            named = {f"C {chunk}": {}}
            add("tiny", "video", 2048, variants((0.05,), named), 96, 8, chunk_tokens=chunk)
            add("smollm2", "chain", 2048, variants((0.05,), named), 48, 8, chunk_tokens=chunk)
    return sorted(result, key=lambda unit: (unit.tokens, unit.number))
