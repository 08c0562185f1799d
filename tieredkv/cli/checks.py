"""What a command refuses at once: the rules of other rooms, from modules that import neither torch nor transformers."""

from __future__ import annotations

from typing import Any

from tieredkv.memory.units import check_gpu_kv_gb, check_host_kv_gb
from tieredkv.policy.names import check_name
from tieredkv.session.generation_settings import check_new_tokens
from tieredkv.video.sampling import Sampling


def check_options(tiers: dict[str, Any], sampling: dict[str, Any], max_new_tokens: int | None = None) -> Sampling:
    """Raise a `TieredKVError` for a value outside its range, otherwise return how to sample the video.

    tiers: `gpu_kv_gb`, `host_kv_gb` and `policy`, as far as they were given.
    """
    checks = {"gpu_kv_gb": check_gpu_kv_gb, "host_kv_gb": check_host_kv_gb, "policy": check_name}
    for name, check in checks.items():
        if name in tiers:
            check(tiers[name])
    check_new_tokens(max_new_tokens)
    return Sampling(**sampling)
