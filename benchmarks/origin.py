"""Machine, date, versions and command of a benchmark, which are written into every result."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# As the command line does. Read when torch is imported: benchmarks import this module before it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_BESIDE = Path(__file__).parent / "results"
RESULTS = _BESIDE if _BESIDE.is_dir() else Path.cwd()
"""Folder of results: beside the benchmarks in a checkout, the current folder otherwise."""


def processor_name() -> str:
    """The system's name for the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, tieredkv, torch, transformers and the given packages."""

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:  # run from a source tree
            return "not installed"

    return {
        "python": platform.python_version(),
        **{name: installed(name) for name in ("tieredkv", "torch", "transformers", *packages)},
    }


def origin(*packages: str) -> dict[str, Any]:
    """Date, machine, versions and the command that is running."""
    import torch

    card = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU used"
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores of {processor_name()}{card}",
        "wait_policy": os.environ["OMP_WAIT_POLICY"],
        "versions": versions(*packages, *(["triton"] if torch.cuda.is_available() else [])),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a result, with four digits after the point."""
    return [{name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()} for row in rows]


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print a result as one line of JSON, a benchmark's last, and write it to `out` if that is given."""
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
