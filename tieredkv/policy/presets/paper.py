"""HybridKV with the paper's own score."""

from tieredkv.policy.base import Policy

POLICY = Policy(
    name="paper",
    source="HybridKV, arXiv 2604.05887 (the score and theta; k, window, equations and cuboid digest are ours)",
    summary="HybridKV as close to the paper as its publication allows: a head is static when the top k of its text "
    "rows hold 90 % of their attention; budgets go to types by number, to static heads by 1 - S; dynamic heads rank "
    "chunks by cuboid digests.",
)
