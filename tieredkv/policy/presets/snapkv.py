"""SnapKV: keep what the last rows of the prompt attend to."""

from tieredkv.policy.base import Policy
from tieredkv.policy.prune import by_saliency

POLICY = Policy(
    name="snapkv",
    source="SnapKV, arXiv 2404.14469",
    summary="All heads static, the same budget for each: the tokens that the last rows of the prompt attend to most, "
    "smoothed over neighbours, and the recent window. Pruned once; what is pruned is not seen again.",
    theta=0.0,
    static_weight="even",
    static_floor=1.0,
    rank=by_saliency,
)
