"""What a command refuses at once: the rules of other rooms, from modules that import neither torch nor transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tieredkv.errors import OptionError, SessionError
from tieredkv.memory.units import check_gpu_kv_gb, check_host_kv_bits, check_host_kv_gb, check_step_overhead
from tieredkv.policy.names import check_name
from tieredkv.session.generation_values import check_values
from tieredkv.session.manifest import read_manifest
from tieredkv.video.sampling import Sampling
from tieredkv.video.suffixes import FILMS


def check_options(tiers: dict[str, Any], sampling: dict[str, Any], max_new_tokens: int | None = None) -> Sampling:
    """Raise a `TieredKVError` for a value outside its range, otherwise return how to sample the video.

    tiers: `gpu_kv_gb`, `host_kv_gb`, `host_kv_bits`, `policy` and `step_overhead`, as far as they were given; others
    are not looked at.
    """
    checks = {
        "gpu_kv_gb": check_gpu_kv_gb,
        "host_kv_gb": check_host_kv_gb,
        "host_kv_bits": check_host_kv_bits,
        "policy": check_name,
        "step_overhead": check_step_overhead,
    }
    for name, check in checks.items():
        if name in tiers:
            check(tiers[name])
    check_values({"max_new_tokens": max_new_tokens})
    return Sampling(**sampling)


SESSION = ".tkv"
"""How the docs name session files."""


def refuse_missing_question(word: str) -> None:
    """Raise `OptionError` if the only word of `ask` is no question but a file, there or not."""
    if _is_session(word):
        raise OptionError(f'{word} is a session: ask it as in tieredkv ask --session {word} "What ...?".')
    if os.path.isfile(word) or (" " not in word.strip() and Path(word).suffix.lower() in FILMS):
        raise OptionError(f'{word} is a file, and the question is missing: tieredkv ask {word} "What ...?".')


def refuse_session(video: str) -> None:
    """Raise `OptionError` for a saved session where a video is expected."""
    if _is_session(video):
        raise OptionError(f"{video} is a session, not a video: give it as --session {video}.")


def _is_session(word: str) -> bool:
    """Whether a file is a session, or is called as one, there or not."""
    if " " not in word.strip() and word.lower().endswith(SESSION):
        return True
    try:
        read_manifest(word)
    except SessionError:
        return False
    return True
