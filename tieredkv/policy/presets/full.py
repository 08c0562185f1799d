"""The full cache."""

from tieredkv.policy.base import Policy

POLICY = Policy(
    name="full",
    source="transformers",
    summary="No policy: everything on the device, refused where it does not fit. What all others are compared with.",
    theta=2.0,
    keep_all=True,
)
