"""HybridKV: heads that attend to few tokens while the question is read are pruned, the others retrieve."""

from tieredkv.policy.base import Policy

POLICY = Policy(
    name="hybridkv",
    source="HybridKV, arXiv 2604.05887, for its stages; classification and ranking are ours",
    summary="A head is static when tokens chosen by some of the question's rows keep nearly all attention of the other "
    "rows; it holds only those tokens, on the device, text first. All others keep everything in host memory, rank its "
    "chunks at each step by sketches of every key (half its dimensions, in 4 bits) and fetch the best. They share the "
    "budget that static heads leave, and get more where attention is spread. The default.",
    head_score="coverage",
    theta=0.99,
    digest="sketch",
    digest_bits=4,
    dynamic_floor=0.3,
    stay=2.0,
)
