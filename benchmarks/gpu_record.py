"""The record of a run on a card: one line of JSON per fact, on disk as soon as it is known; and how a part is run."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from origin import origin

RESTART = 3
"""Exit code of a part whose CUDA context no longer works: the facts that are left need a new process."""
GRACE_S = 10
"""Seconds after a fact's limit until its process is ended, if the exception did not stop it."""
END_LINES = 12
"""Lines of a traceback that are recorded."""

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fact:
    """Something to measure. An iterable's items become a line each, as they come."""

    name: str
    seconds: float
    """Time limit."""
    work: Callable[[], Values | Iterable[Values]]


@dataclass(frozen=True, slots=True)
class Run:
    """What is measured, and on which device."""

    out: Path
    dry: bool
    """Small shapes on a CPU: shows that the script runs, measures nothing."""
    started: float
    """`time.time()` at the start of the whole run."""

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.dry:
            torch.cuda.synchronize()

    def add(self, part: str, fact: str, **values: Any) -> None:
        """Append a line to the record. It is on disk when this returns."""
        line = {"part": part, "fact": fact, "t_s": round(time.time() - self.started, 1), **values}
        with (self.out / "gpu.jsonl").open("a") as file:
            file.write(json.dumps(rounded(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def rounded(value: Any) -> Any:
    """Floats to five significant digits, in nested values too."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


# ---- a part, in its own process


def run_facts(run: Run, part: str, facts: list[Fact], begun: set[str]) -> None:
    """Measure and record all facts but those `begun` in an earlier process. A fact that fails is recorded as such.

    Exits with `RESTART` after an error of the card, which leaves the process unable to use it.
    """
    print(f"## {len(facts)}", flush=True)
    for fact in facts:
        if fact.name in begun:
            continue
        print(f"== {fact.name}", flush=True)
        begin = time.perf_counter()
        _limit(fact.seconds)
        try:
            result = fact.work()
            for values in [result] if isinstance(result, dict) else result:
                run.add(part, fact.name, **values, wall_s=round(time.perf_counter() - begin, 2))
        except Exception as error:  # noqa: BLE001
            took = round(time.perf_counter() - begin, 2)
            run.add(part, fact.name, error=_reason(error), **_ends(error), wall_s=took)
            traceback.print_exc()
            if "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError":
                sys.stdout.flush()
                os._exit(RESTART)
        finally:
            _limit(0)
        if not run.dry:
            gc.collect()
            torch.cuda.empty_cache()


def _limit(seconds: float) -> None:
    """Raise TimeoutError after so many seconds, and end the process if that does not help; 0: no limit."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.cancel_dump_traceback_later()
    if seconds:
        faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def _ends(error: BaseException) -> Values:
    """The ends of the traceback, and of that of the error that was being handled, if there was one."""
    ends: Values = {"end": end(traceback.format_exception(error, chain=False))}
    if error.__context__ is not None and not error.__suppress_context__:
        first = error.__context__
        ends |= {"while_handling": _reason(first), "its_end": end(traceback.format_exception(first, chain=False))}
    return ends


def end(text: str | list[str]) -> list[str]:
    """The last lines, without those that only underline the one before."""
    lines = "".join(text).strip().splitlines()
    return [line[:200] for line in lines if line.strip(" ^~")][-END_LINES:]


def end_of_log(printed: str) -> list[str]:
    """The last lines of a process that ended; where it dumped its threads, the innermost calls of the last one."""
    _, marker, calls = printed.rpartition("(most recent call first):\n")
    return calls.splitlines()[:END_LINES] if marker else end(printed)


# ---- where it ran

QUERY = {
    "card": "name",
    "driver": "driver_version",
    "memory": "memory.total",
    "pcie_generation": "pcie.link.gen.current",
    "pcie_generation_max": "pcie.link.gen.max",
    "pcie_width": "pcie.link.width.current",
    "pcie_width_max": "pcie.link.width.max",
    "clock_sm": "clocks.sm",
    "clock_sm_max": "clocks.max.sm",
    "clock_memory_max": "clocks.max.memory",
    "power_limit": "power.limit",
    "power": "power.draw",
    "temperature": "temperature.gpu",
}


def card_state() -> dict[str, str | None]:
    """What the driver says about the card now; None where it is not known."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY.values())}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
        cells = [cell.strip() for cell in done.stdout.splitlines()[0].split(",")] if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired, IndexError):
        cells = []
    if len(cells) != len(QUERY):
        return dict.fromkeys(QUERY)
    return {name: None if "N/A" in cell or not cell else cell for name, cell in zip(QUERY, cells, strict=True)}


def pcie_of_system() -> list[dict[str, str]]:
    """Link of each display or 3D device, as the kernel states it."""
    names = ("vendor", "device", "current_link_speed", "current_link_width", "max_link_speed", "max_link_width")
    return [
        {"address": folder.name, **{name: _read(folder / name) or "" for name in names}}
        for folder in sorted(Path("/sys/bus/pci/devices").glob("*"))
        if (_read(folder / "class") or "").startswith("0x03")
    ]


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def machine(run: Run) -> Values:
    """The first line of a record: machine, card, link, limits, versions, date."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    more: Values = {} if run.dry else {"capability": torch.cuda.get_device_capability(), "cuda": torch.version.cuda}
    if not run.dry:
        properties = torch.cuda.get_device_properties(0)
        more |= {"multiprocessors": properties.multi_processor_count, "card_bytes": properties.total_memory}
    return {
        **origin("accelerate", "numpy", "triton", "av", "psutil"),
        "dry_run": run.dry,
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "host_bytes": memory,
        "memlock_bytes": None if locked == resource.RLIM_INFINITY else locked,
        "huge_pages": _read(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "nvidia_smi": dict.fromkeys(QUERY) if run.dry else card_state(),
        "pci": pcie_of_system(),
        **more,
    }
