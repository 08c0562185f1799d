"""The full cache."""

from tieredkv.policy.base import Policy

POLICY = Policy(
    name="full",
    source="transformers",
    summary="No policy: everything on the device, refused where it does not fit. The baseline of all comparisons.",
    theta=2.0,
    keep_all=True,
)
