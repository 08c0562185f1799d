"""Defaults of options from the user's `tieredkv.toml`; the environment and the command line take precedence."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from tieredkv.errors import OptionError

KEYS: dict[str, Any] = {
    "model": str,
    "weights": str,
    "gpu_kv_gb": float,
    "host_kv_gb": float,
    "host_kv_bits": int,
    "step_overhead": float,
    "ahead": bool,
    "fps": float,
    "max_frames": int,
    "max_pixels": int | str,
    "fit": bool,
    "policy": str,
    "max_new_tokens": int,
    "card": str,
    "link": str,
}
_EXPECTED = {
    str: "text in quotes",
    float: "a number",
    int: "a whole number",
    int | str: "a whole number, or a size in quotes",
    bool: "true or false",
}


def path() -> Path:
    """`$XDG_CONFIG_HOME/tieredkv.toml`, by default in `~/.config`; it need not exist."""
    return folder("XDG_CONFIG_HOME", "~/.config") / "tieredkv.toml"


def folder(variable: str, default: str) -> Path:
    """The folder that an environment variable names; the default if it is not absolute, as XDG requires."""
    value = Path(os.environ.get(variable, ""))
    return value if value.is_absolute() else Path(default).expanduser()


def read(path: Path) -> dict[str, Any]:
    """The defaults in a file; none if it does not exist. Raises `OptionError`, naming file and key."""
    try:
        settings = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"{path} is not TOML ({error}): fix or remove it.") from None
    for key, value in settings.items():
        if key not in KEYS:
            raise OptionError(f"{path}: {key!r} is not a setting: give one of {', '.join(KEYS)}.")
        kind = KEYS[key]
        allowed = int | float if kind is float else kind
        if not isinstance(value, allowed) or isinstance(value, bool) is not (kind is bool):
            raise OptionError(f"{path}: {key} = {value!r} is not valid: give {_EXPECTED[kind]}.")
    return settings
