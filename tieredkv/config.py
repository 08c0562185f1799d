"""TierConfig: every setting of the tiered cache, validated once. Sizes are GiB (2**30 bytes)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from tieredkv.errors import BudgetError, OptionError
from tieredkv.memory.units import GIB
from tieredkv.policy.base import Policy
from tieredkv.policy.digests import DIGESTS
from tieredkv.policy.presets import POLICIES

DEFAULT_FPS = 2.0
"""Frames sampled per second where neither the caller nor the processor says (Qwen2.5-VL's own rate)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierConfig:
    """Settings of one tiered cache. Immutable; `dataclasses.replace` makes a changed copy.

    Raises `BudgetError` on construction when a value is outside its range.
    """

    gpu_kv_gb: float = 4.0
    """Hard cap, in GiB, on the device memory that keys and values may occupy: pool, digests, staging, scores."""
    chunk_tokens: int = 8
    """C: tokens in one chunk, the unit of transfer and of a device page."""
    policy: str = "hybridkv"
    """What is kept and what is fetched: a name in `POLICIES`, listed by `tieredkv policies`."""
    budget_ratio: float | None = None
    """Mean share of the prompt a head attends to per step; None: as much as fits under `gpu_kv_gb`."""
    spare_ratio: float = 0.2
    """Share of a dynamic head's retrieval slots left for chunks that are resident but not selected. With a
    `budget_ratio`, which says how many are selected, a larger share is a larger pool: faster, the answers the same (but
    with `adaptive`, which selects from it)."""
    sink_tokens: int = 4
    """First tokens of the prompt that dynamic heads always attend to."""
    recent_window: int = 32
    """Last tokens of the prompt that every head always attends to."""
    pack_pages: bool = True
    """Hold keys and values on the device in 8 bits (`packing`), so that twice as many fit, unless a step attends to
    everything and it fits as it is. Those on the host stay as the model made them."""
    prefill_chunk: int = 2048
    """Prompt tokens per forward call during prefill."""
    encode_batch: int | None = None
    """Visual tokens per call of the vision tower; None: as many as keep its activations small, whole frames always."""
    host_kv_gb: float | None = None
    """Cap, in GiB, on the host memory of the complete cache; None: a safe share of what the machine has available."""
    adaptive: bool = False
    """Let a dynamic head attend to more chunks, of its spare slots, while much attention mass seems to go unseen.
    Needs a digest that estimates it, such as "sketch"."""
    prefetch: bool = True
    """Where a step may attend to the chunks chosen a step before (`reuse_above`), copy them meanwhile."""

    head_score: str | None = None
    """This and what follows change one field of the policy, which says what it means (`policy.base.Policy`); None
    leaves it as it is."""
    theta: float | None = None
    top_k_ratio: float | None = None
    text_window: int | None = None
    score_group: str | None = None
    type_split: float | None = None
    static_weight: str | None = None
    static_floor: float | None = None
    dynamic_floor: float | None = None
    saliency_window: int | None = None
    saliency_pool: int | None = None
    pruning: str | None = None
    """Prune static heads by the rule of the policy of this name."""
    digest: str | None = None
    digest_bits: int | None = None
    chunk_group: str | None = None
    stay: float | None = None
    dense_layers: int | None = None
    reuse_above: float | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, want: str) -> None:
            if not ok:
                raise BudgetError(f"{name}={getattr(self, name)!r} is not valid: give {want}.")

        def is_number(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

        for name in ("gpu_kv_gb", "spare_ratio"):
            check(is_number(getattr(self, name)), name, "a finite number")
        check(
            0 < self.gpu_kv_gb <= 2**20,
            "gpu_kv_gb",
            "a number of GiB above 0 (fractions are allowed) and at most 2**20",
        )
        for name in ("chunk_tokens", "prefill_chunk"):
            value = getattr(self, name)
            check(isinstance(value, int) and value >= 1, name, "a whole number of at least 1")
        for name in ("encode_batch", "host_kv_gb"):
            value, whole = getattr(self, name), name == "encode_batch"
            good = is_number(value) and value > 0 and (not whole or isinstance(value, int))
            check(value is None or good, name, f"None or a {'whole ' if whole else ''}number above 0")
        for name in ("sink_tokens", "recent_window"):
            value = getattr(self, name)
            check(isinstance(value, int) and value >= 0, name, "a whole number of at least 0")
        check(0 <= self.spare_ratio < 1, "spare_ratio", "a share of at least 0 and below 1")
        check(
            self.budget_ratio is None or (is_number(self.budget_ratio) and 0 < self.budget_ratio <= 1),
            "budget_ratio",
            "None or a share above 0 and at most 1",
        )
        for name in ("policy", "pruning"):
            value = getattr(self, name)
            known = isinstance(value, str) and value in POLICIES
            check(known or (value is None and name == "pruning"), name, f"one of {', '.join(POLICIES)}")
        for name in ("adaptive", "pack_pages", "prefetch"):
            check(isinstance(getattr(self, name), bool), name, "True or False")
        method = _method.__wrapped__(self)  # raises where a field does not suit the policy
        if self.adaptive:
            estimates = DIGESTS[method.digest].estimates_mass
            check(estimates, "adaptive", "a digest with it that estimates what goes unseen, such as 'sketch'")
            check(method.reuse_above > 1, "adaptive", "no reuse_above with it: a reused choice has the size it had")

    @property
    def method(self) -> Policy:
        """The policy with the fields that are given here."""
        return _method(self)

    @property
    def cap_bytes(self) -> int:
        """`gpu_kv_gb` in bytes."""
        return int(self.gpu_kv_gb * GIB)


OVERRIDES = tuple({field.name for field in fields(TierConfig)} & {field.name for field in fields(Policy)})
"""Fields of a policy that a `TierConfig` can change."""


@lru_cache(maxsize=256)
def _method(tiers: TierConfig) -> Policy:
    changes = {name: getattr(tiers, name) for name in OVERRIDES if getattr(tiers, name) is not None}
    if tiers.pruning is not None:
        changes |= {"rank": POLICIES[tiers.pruning].rank, "merge": POLICIES[tiers.pruning].merge}
    return replace(POLICIES[tiers.policy], **changes)


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
