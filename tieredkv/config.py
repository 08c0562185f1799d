"""TierConfig: every setting of the tiered cache, validated once. Sizes are GiB (2**30 bytes)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, overload

from tieredkv.errors import OptionError, check_value, check_whole, is_number
from tieredkv.memory.units import GIB, check_gpu_kv_gb, check_host_kv_bits, check_host_kv_gb, check_step_overhead
from tieredkv.policy.base import Policy
from tieredkv.policy.digests import DIGESTS
from tieredkv.policy.names import DEFAULT_POLICY, check_name
from tieredkv.policy.presets import POLICIES

DEFAULT_FPS = 2.0
"""Frames sampled per second if neither the caller nor the processor sets a rate (Qwen2.5-VL's own)."""


class PolicyField:
    """A dataclass field that is set to a policy, or to its name in `POLICIES`, and always reads as the policy."""

    @overload
    def __get__(self, instance: None, owner: type) -> str: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Policy: ...
    def __get__(self, instance: Any, owner: type) -> str | Policy:
        return DEFAULT_POLICY if instance is None else instance._policy

    def __set__(self, instance: Any, value: str | Policy) -> None:
        object.__setattr__(instance, "_policy", find_policy(value))


def find_policy(policy: str | Policy) -> Policy:
    """The policy of this name in `POLICIES`; a `Policy` is returned as is. Raises `OptionError` for an unknown name."""
    if isinstance(policy, Policy):
        return policy
    check_name(policy)
    return POLICIES[policy]


@dataclass(frozen=True, kw_only=True)
class TierConfig:
    """Settings of one tiered cache. Immutable; `dataclasses.replace` makes a changed copy.

    Raises `BudgetError` on construction when a memory size is outside its range, `OptionError` when another value is.
    """

    gpu_kv_gb: float = 4.0
    """Hard cap, in GiB, on the device memory that keys and values may occupy: pool, digests, staging, scores."""
    chunk_tokens: int = 8
    """C: tokens in one chunk, the unit of transfer and of a device page."""
    policy: PolicyField = PolicyField()
    """What is kept and what is fetched: a `Policy`, or a name in `POLICIES` (listed by `tieredkv policies`), which is
    replaced by that policy. To change theta: `replace(POLICIES["hybridkv"], theta=0.9)`."""
    budget_ratio: float | None = None
    """Mean share of the prompt a head attends to per step; None: as much as fits under `gpu_kv_gb` and, where the link
    is known, as `step_overhead` allows."""
    step_overhead: float | None = 0.15
    """Without a `budget_ratio`: the most that a step may wait for chunks from the host, as predicted, relative to the
    time of the weights alone. What then is not attended to becomes spare slots; at least what a `budget_ratio` of 0.05
    gives is attended to (`planning.decode_plan`). None or infinity: no limit."""
    link_gb_s: float | None = None
    """Rate of the link between host and card, in GB/s (1e9 bytes) of one large copy. None: on a card as measured once
    per machine, on a CPU unknown, so that `step_overhead` limits nothing."""
    spare_ratio: float = 0.2
    """Share of a dynamic head's retrieval slots reserved for chunks that are resident but not selected. With
    `budget_ratio`, which fixes how many are selected, a larger share enlarges the pool: decoding is faster and answers
    stay the same (except with `adaptive`, which selects into the spare slots)."""
    sink_tokens: int = 4
    """First tokens of the prompt that dynamic heads always attend to."""
    recent_window: int = 32
    """Last tokens of the prompt that every head always attends to."""
    host_kv_bits: int | None = None
    """Bits of a number in host memory, in session files, on the link and on the device: 16 stands for the model's
    dtype, 8 and 4 for `codecs`. None: 16 if steps attend to everything and all of it fits on the device unpacked, under
    `policy="full"` and with `pack_pages=False`, otherwise 8 (`planning.host_plan`)."""
    pack_pages: bool = True
    """Where the host tier has 16 bits, store keys and values on the device in 8, so that twice as many fit, unless
    steps attend to everything and all of it fits unpacked."""
    prefill_chunk: int = 2048
    """Prompt tokens per forward call during prefill."""
    encode_batch: int | None = None
    """Visual tokens per call of the vision tower, in whole frames; None: few enough to keep its activations small."""
    host_kv_gb: float | None = None
    """Cap, in GiB, on the host memory of the complete cache; None: a safe share of what the machine has available."""
    adaptive: bool = False
    """Let a dynamic head use its spare slots to attend to more chunks while its estimated unseen attention mass is
    high. Needs a digest that estimates mass (`Digest.estimates_mass`)."""
    prefetch: bool = True
    """Copy chunks in the background before a step needs them: for heads that may reuse this step's choice in the next
    one (`reuse_above`), or as `ahead` says. Never changes an answer."""
    ahead: bool | None = None
    """Predict each layer's query while the layer before computes, and copy what it will miss. None: where a step is
    predicted to be better with it, on a card whose rates are known (`planning.decode_plan`); never on a CPU, where it
    costs more than it saves. Not yet measured on a card."""

    def __post_init__(self) -> None:
        def wanted(ok: bool, name: str, want: str) -> None:
            check_value(ok, name, getattr(self, name), want)

        check_gpu_kv_gb(self.gpu_kv_gb)
        check_host_kv_gb(self.host_kv_gb)
        check_host_kv_bits(self.host_kv_bits)
        check_step_overhead(self.step_overhead)
        ratio = self.budget_ratio
        for name in ("chunk_tokens", "prefill_chunk"):
            check_whole(name, getattr(self, name))
        for name in ("sink_tokens", "recent_window"):
            check_whole(name, getattr(self, name), 0)
        if self.encode_batch is not None:
            check_whole("encode_batch", self.encode_batch)
        share = is_number(self.spare_ratio) and 0 <= self.spare_ratio < 1
        wanted(share, "spare_ratio", "a share of at least 0 and below 1")
        share = ratio is None or (is_number(ratio) and 0 < ratio <= 1)
        wanted(share, "budget_ratio", "None or a share above 0 and at most 1")
        if self.step_overhead == math.inf:
            object.__setattr__(self, "step_overhead", None)  # as JSON knows no infinity
        link = self.link_gb_s
        fast = link is None or (is_number(link) and 0 < link < 1e6)
        wanted(fast, "link_gb_s", "None or GB/s, a number above 0 and below a million")
        for name in ("adaptive", "pack_pages", "prefetch"):
            wanted(isinstance(getattr(self, name), bool), name, "True or False")
        wanted(self.ahead is None or isinstance(self.ahead, bool), "ahead", "None, True or False")
        if self.adaptive:
            estimating = [name for name, digest in DIGESTS.items() if digest.estimates_mass]
            need = f"it with digest={' or '.join(map(repr, estimating))}: others do not estimate attention mass"
            wanted(self.policy.digest in estimating, "adaptive", need)
            wanted(self.policy.reuse_above > 1, "adaptive", "it without reuse_above: a reused choice keeps its size")

    @property
    def cap_bytes(self) -> int:
        """`gpu_kv_gb` in bytes."""
        return int(self.gpu_kv_gb * GIB)


FIELDS = frozenset(field.name for field in fields(TierConfig))
POLICY_FIELDS = frozenset(field.name for field in fields(Policy))


def tier_config(tiers: TierConfig | None, options: dict[str, Any]) -> TierConfig:
    """`tiers`, or a TierConfig of the options that are not None (of `step_overhead` that is a value of its own). Raises
    `OptionError`, `BudgetError`."""
    given = {name: value for name, value in options.items() if value is not None or name == "step_overhead"}
    if tiers is None:
        refuse_policy_fields(given)
        if unknown := sorted(given.keys() - FIELDS):
            raise OptionError(f"{unknown[0]!r} is not an option: the options are the fields of TierConfig.")
        return TierConfig(**given)
    if not isinstance(tiers, TierConfig):
        raise OptionError(f"tiers is a {type(tiers).__name__}: give a TierConfig, or its fields as keywords.")
    if given:
        raise OptionError(f"give either tiers or {', '.join(sorted(given))}, not both.")
    return tiers


def refuse_policy_fields(options: dict[str, Any]) -> None:
    """Raise `OptionError` for an option that is a policy field; the message says how to change it."""
    changes = {name: f"{name}=..." for name in POLICY_FIELDS}
    changes["pruning"] = "rank=POLICIES['snapkv'].rank"
    for name in options:
        if name in changes:
            preset = options.get("policy")
            preset = preset if isinstance(preset, str) else DEFAULT_POLICY
            raise OptionError(
                f"{name!r} belongs to the policy: give policy=replace(POLICIES[{preset!r}], {changes[name]}), with "
                "dataclasses.replace and tieredkv.POLICIES."
            )


# ---- settings in a file

RULES = ("rank", "merge")
"""Policy fields that are functions. A file stores the name of the preset whose function it is."""


def tiers_as_plain(tiers: TierConfig) -> dict[str, Any]:
    """Settings as JSON values, for `tiers_from_file`. The policy becomes its preset and the fields that differ."""
    policy = tiers.policy
    preset = POLICIES.get(policy.name, POLICIES[DEFAULT_POLICY])
    plain: dict[str, Any] = {"preset": preset.name}
    for name in sorted(POLICY_FIELDS):
        value = getattr(policy, name)
        if value != getattr(preset, name):
            plain[name] = _preset_with(name, value) if name in RULES else value
    return {**{name: getattr(tiers, name) for name in sorted(FIELDS)}, "policy": plain}


def _preset_with(rule: str, value: Any) -> str | None:
    """Name of a preset with this function for the rule; None if there is none."""
    return next((name for name, preset in POLICIES.items() if getattr(preset, rule) == value), None)


def tiers_from_file(plain: dict[str, Any], policy: str | Policy | None = None) -> TierConfig:
    """The settings that `tiers_as_plain` of this or another version wrote; unknown fields are ignored.

    policy: used instead of the stored one, which is then not read. Raises `OptionError` when the stored policy is
    unknown, or uses the user's own functions, which are not stored.
    """
    given = {name: value for name, value in plain.items() if name in FIELDS}
    given["policy"] = _stored_policy(plain) if policy is None else policy
    return TierConfig(**given)


def _stored_policy(plain: dict[str, Any]) -> Policy:
    stored = plain.get("policy", DEFAULT_POLICY)
    if isinstance(stored, dict):
        preset = find_policy(stored.get("preset", ""))
        changes = {name: value for name, value in stored.items() if name in POLICY_FIELDS}
    else:  # older files: a name, and next to it the changed fields (None: unchanged)
        preset = find_policy(stored)
        changes = {name: plain[name] for name in POLICY_FIELDS if plain.get(name) is not None}
        if plain.get("pruning") is not None:
            changes |= dict.fromkeys(RULES, plain["pruning"])
    for rule in changes.keys() & set(RULES):
        if changes[rule] is None:
            name = changes.get("name", preset.name)
            raise OptionError(
                f"the saved policy {name!r} uses its own {rule} function, which is not in the file: give policy=."
            )
        changes[rule] = getattr(find_policy(changes[rule]), rule)
    return replace(preset, **changes)
