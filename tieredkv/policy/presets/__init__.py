"""The policies by name. A new one is a file here and a line in `POLICIES`."""

from __future__ import annotations

from tieredkv.policy.base import Policy
from tieredkv.policy.presets import arkvale, full, hybridkv, lookm, mixkv, paper, quest, snapkv, streaming

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        hybridkv.POLICY,
        paper.POLICY,
        mixkv.POLICY,
        snapkv.POLICY,
        lookm.POLICY,
        streaming.POLICY,
        quest.POLICY,
        arkvale.POLICY,
        full.POLICY,
    )
}
"""The policies that come with the package, by name."""
