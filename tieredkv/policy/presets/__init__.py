"""The policies by name. A new one is a file here and a line in `policy.names`."""

from __future__ import annotations

from importlib import import_module

from tieredkv.policy.base import Policy
from tieredkv.policy.names import NAMES

POLICIES: dict[str, Policy] = {name: import_module(f"{__name__}.{name}").POLICY for name in NAMES}
"""The policies that come with the package, by name."""
