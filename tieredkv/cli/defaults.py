"""Defaults of options, from `tieredkv.toml` in the user's folder of settings; the environment and options go before."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from tieredkv.errors import OptionError

KEYS: dict[str, type] = {
    "model": str,
    "gpu_kv_gb": float,
    "host_kv_gb": float,
    "fps": float,
    "max_frames": int,
    "policy": str,
    "max_new_tokens": int,
    "card": str,
    "link": str,
}
_WANTED = {str: "text in quotes", float: "a number", int: "a whole number"}


def path() -> Path:
    """Where the file is, if there is one: `$XDG_CONFIG_HOME/tieredkv.toml`, by default below `~/.config`."""
    return folder("XDG_CONFIG_HOME", "~/.config") / "tieredkv.toml"


def folder(variable: str, default: str) -> Path:
    """A folder that the environment names; the default where it names none, or not from the root (XDG says so)."""
    named = Path(os.environ.get(variable, ""))
    return named if named.is_absolute() else Path(default).expanduser()


def read(path: Path) -> dict[str, Any]:
    """The defaults in a file; none where there is no file. Raises `OptionError` naming file and key."""
    try:
        found = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"{path} is not TOML ({error}): mend it or remove it.") from None
    for key, value in found.items():
        if key not in KEYS:
            raise OptionError(f"{path}: {key!r} is no setting: give one of {', '.join(KEYS)}.")
        wanted = KEYS[key]
        number = wanted is float and type(value) is int
        if type(value) is not wanted and not number:
            raise OptionError(f"{path}: {key} = {value!r} is not valid: give {_WANTED[wanted]}.")
    return found
