"""Names of the policies that come with the package. A new one is a name here and a file in `policy.presets`."""

from __future__ import annotations

from tieredkv.errors import check_value

NAMES = ("hybridkv", "paper", "mixkv", "snapkv", "lookm", "streaming", "quest", "arkvale", "full")
DEFAULT_POLICY = "hybridkv"


def check_name(policy: object) -> None:
    """Raise `OptionError` unless this is the name of a policy."""
    check_value(
        isinstance(policy, str) and policy in NAMES, "policy", policy, f"one of {', '.join(NAMES)}, or a Policy"
    )
