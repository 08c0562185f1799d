"""Settings as in a command line or a file of results: fields of the policy and of TierConfig together."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from tieredkv import POLICIES, Policy, TierConfig

POLICY_FIELDS = {field.name for field in fields(Policy)}


def tier_config(policy: str = "hybridkv", **settings: Any) -> TierConfig:
    """`tier_config(policy="paper", theta=0.5, budget_ratio=0.1)`: settings of the policy change the one named."""
    changes = {name: value for name, value in settings.items() if name in POLICY_FIELDS}
    others = {name: value for name, value in settings.items() if name not in POLICY_FIELDS}
    return TierConfig(policy=replace(POLICIES[policy], **changes), **others)
