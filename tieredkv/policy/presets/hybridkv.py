"""HybridKV: heads that the question shows to look at few tokens are pruned, the others retrieve."""

from tieredkv.policy.base import Policy

POLICY = Policy(
    name="hybridkv",
    source="HybridKV, arXiv 2604.05887 (the stages and the score; equations and digest are ours)",
    summary="Classifies each head by how few tokens hold its attention from the question's rows. Concentrated heads "
    "keep a pruned cache on the device, text first; all others keep everything in host memory, rank its chunks at each "
    "step by cuboid digests, and fetch the best. The default.",
)
