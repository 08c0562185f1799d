"""ArkVale: every head retrieves, by a box around the bulk of each chunk's keys."""

from tieredkv.policy.base import Policy

POLICY = Policy(
    name="arkvale",
    source="ArkVale, NeurIPS 2024",
    summary="All heads dynamic. A chunk's digest is a box centred between the extremes of its keys that reaches as far "
    "as they deviate on average; scored like Quest's.",
    theta=2.0,
    chunk_group="max",
)
