"""Quest: every head retrieves, by the bounding box of each chunk's keys."""

from tieredkv.policy.base import Policy

POLICY = Policy(
    name="quest",
    source="Quest, arXiv 2406.10774",
    summary="All heads dynamic. A chunk's digest is the per-channel minimum and maximum of its keys, its score the "
    "largest logit that fits the box. The first two layers keep everything on the device, beyond the budget, as in the "
    "paper.",
    theta=2.0,
    digest="minmax",
    chunk_group="max_logit",
    dense_layers=2,
)
