"""TierConfig: every setting of the tiered cache, validated once. Sizes are GiB (2**30 bytes)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tieredkv.errors import BudgetError, OptionError

GIB = 2**30
DEFAULT_FPS = 2.0
"""Frames sampled per second where neither the caller nor the processor says (Qwen2.5-VL's own rate)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierConfig:
    """Settings of one tiered cache. Immutable; `dataclasses.replace` makes a changed copy.

    Raises `BudgetError` on construction when a value is outside its range.
    """

    gpu_kv_gb: float = 4.0
    """Hard cap, in GiB, on the device memory that keys and values may occupy: pool, digests, staging, scores."""
    chunk_tokens: int = 32
    """C: tokens in one chunk, the unit of transfer and of a device page."""
    theta: float = 0.9
    """A KV head is static when its text-centric score S >= theta (HybridKV, stage 1)."""
    top_k_ratio: float = 0.01
    """k of the text-centric score, as a share of the N cached tokens (ours; the paper leaves k open)."""
    text_window: int = 64
    """At most this many of the last text rows give the text-centric score and the saliency (ours)."""
    saliency_window: int = 32
    """At most this many of the last text rows rank the visual tokens of static heads (SnapKV's window)."""
    saliency_pool: int = 5
    """Width of the average pool over neighbouring tokens' saliency (SnapKV)."""
    type_split: float = 1.0
    """r: the dynamic heads' share of the budget relative to their number (HybridKV, stage 2), 0 < r <= 1."""
    static_floor: float = 0.2
    """Share of the static heads' mean budget that each of them gets whatever its score (AdaKV)."""
    budget_ratio: float | None = None
    """Mean share of the prompt a head attends to per step; None: as much as fits under `gpu_kv_gb`."""
    spare_ratio: float = 0.2
    """Share of a dynamic head's retrieval slots left for chunks that are resident but not selected."""
    sink_tokens: int = 4
    """First tokens of the prompt that dynamic heads always attend to."""
    recent_window: int = 32
    """Last tokens of the prompt that every head always attends to."""
    prefill_chunk: int = 2048
    """Prompt tokens per forward call during prefill."""
    encode_batch: int | None = None
    """Visual tokens per call of the vision tower; None: as many as keep its activations small, whole frames always."""
    host_kv_gb: float | None = None
    """Cap, in GiB, on the host memory of the complete cache; None: a safe share of what the machine has available."""
    prefetch: bool = True
    """Copy the chunks ranked just below the selection ahead of the next step."""

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, want: str) -> None:
            if not ok:
                raise BudgetError(f"{name}={getattr(self, name)!r} is not valid: give {want}.")

        def is_number(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

        names = ("gpu_kv_gb", "theta", "top_k_ratio", "type_split", "static_floor", "spare_ratio")
        for name in names:
            check(is_number(getattr(self, name)), name, "a finite number")
        check(
            0 < self.gpu_kv_gb <= 2**20,
            "gpu_kv_gb",
            "a number of GiB above 0 (fractions are allowed) and at most 2**20",
        )
        for name in ("chunk_tokens", "text_window", "saliency_window", "saliency_pool", "prefill_chunk"):
            value = getattr(self, name)
            check(isinstance(value, int) and value >= 1, name, "a whole number of at least 1")
        for name in ("encode_batch", "host_kv_gb"):
            value, whole = getattr(self, name), name == "encode_batch"
            good = is_number(value) and value > 0 and (not whole or isinstance(value, int))
            check(value is None or good, name, f"None or a {'whole ' if whole else ''}number above 0")
        for name in ("sink_tokens", "recent_window"):
            value = getattr(self, name)
            check(isinstance(value, int) and value >= 0, name, "a whole number of at least 0")
        check(self.saliency_pool % 2 == 1, "saliency_pool", "an odd width")
        check(0 < self.top_k_ratio <= 1, "top_k_ratio", "a share above 0 and at most 1")
        check(0 < self.type_split <= 1, "type_split", "a share above 0 and at most 1")
        check(0 <= self.static_floor <= 1, "static_floor", "a share between 0 and 1")
        check(0 <= self.spare_ratio < 1, "spare_ratio", "a share of at least 0 and below 1")
        check(
            self.budget_ratio is None or (is_number(self.budget_ratio) and 0 < self.budget_ratio <= 1),
            "budget_ratio",
            "None or a share above 0 and at most 1",
        )

    @property
    def cap_bytes(self) -> int:
        """`gpu_kv_gb` in bytes."""
        return int(self.gpu_kv_gb * GIB)


def tier_config(tiers: TierConfig | None, fields: dict[str, Any]) -> TierConfig:
    """`tiers`, or one made of its fields; fields that are None were not given. Raises `OptionError`, `BudgetError`."""
    given = {name: value for name, value in fields.items() if value is not None}
    if tiers is None:
        try:
            return TierConfig(**given)
        except TypeError as error:
            raise OptionError(f"{error}; the options are the fields of TierConfig.") from None
    if not isinstance(tiers, TierConfig):
        raise OptionError(f"tiers is a {type(tiers).__name__}: give a TierConfig, or its fields as keywords.")
    if given:
        raise OptionError(f"give either tiers or {', '.join(sorted(given))}, not both.")
    return tiers
