"""HybridKV: heads that the question shows to look at few tokens are pruned, the others retrieve."""

from tieredkv.policy.base import Policy

POLICY = Policy(
    name="hybridkv",
    source="HybridKV, arXiv 2604.05887, for its stages; what classifies and what ranks are ours",
    summary="Static heads, those for which tokens chosen by some of the question's rows keep nearly all attention of "
    "the other rows, hold just those tokens on the device, text first. All others keep everything in host memory, rank "
    "its chunks at each step by sketches of every key, half its dimensions in 4 bits, and fetch the best with the "
    "budget that static heads leave, more where attention is spread. The default.",
    head_score="coverage",
    theta=0.99,
    digest="sketch",
    digest_bits=4,
    dynamic_floor=0.3,
    stay=2.0,
)
