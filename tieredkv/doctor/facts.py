"""Facts about this machine, gathered without importing torch: from `probe`, `nvidia-smi` and the system."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROBE_SECONDS = 300
LINK = ("gen.current", "gen.max", "width.current", "width.max")
"""Fields of `nvidia-smi` below "pcie.link"."""
Facts = Mapping[str, Any]


def probe(command: tuple[str, ...] = ("-P", "-m", "tieredkv.doctor.probe")) -> dict[str, Facts]:
    """Facts by section of `tieredkv.doctor.probe`. If its process crashes, the facts of the crashing section say so."""
    from tieredkv.doctor.probe import SECTIONS

    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=PROBE_SECONDS
        )
        printed, end = done.stdout, _how_it_ended(done.returncode)
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode() if isinstance(error.stdout, bytes) else (error.stdout or "")
        end = f"did not end within {PROBE_SECONDS} s"
    facts: dict[str, Facts] = {}
    for line in printed.splitlines():
        if line.startswith("{"):
            facts |= json.loads(line)
    missing = [name for name in SECTIONS if name not in facts]
    for name in missing:
        facts[name] = {
            "error": f"importing it {end}" if name == missing[0] else "unknown, because an earlier import crashed"
        }
    return facts


def _how_it_ended(code: int) -> str:
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    return f"ended Python with exit code {code}"


def nvidia_smi() -> dict[str, str]:
    """Driver and link of the first card according to `nvidia-smi`; empty if there is none."""
    fields = ("name", "driver_version", *(f"pcie.link.{what}" for what in LINK))
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if done.returncode:
        return {}
    rows = list(csv.reader(done.stdout.splitlines(), skipinitialspace=True))
    return dict(zip(fields, rows[0], strict=False)) if rows else {}


def compiler(environment: Mapping[str, str] = os.environ) -> str | None:
    """The C compiler that Triton would use."""
    return environment.get("CC") or shutil.which("gcc") or shutil.which("clang")


def memlock_limit() -> int | None:
    """`ulimit -l` in bytes; None if there is no limit."""
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft
