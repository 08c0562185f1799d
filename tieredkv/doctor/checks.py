"""What `tieredkv doctor` says of this machine: one check each, ok, a note or a problem, and what to do about it.

Imports neither torch nor anything of it: what must be imported to be looked at is looked at by `doctor_probe`.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

FLOORS = {"python": (3, 11), "torch": (2, 11), "torchvision": (0, 26), "transformers": (5, 17)}
"""The oldest versions that do; as in pyproject.toml."""
LEAST_HOST = 2**30
"""Bytes of host memory below which nothing of use fits."""
KERNELS_FROM = (8, 0)
"""Compute capability for which Triton's kernels are made."""
PROBE_SECONDS = 300
INDEX = "https://download.pytorch.org/whl"
Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    state: Literal["ok", "note", "problem"]
    found: str
    remedy: str = ""
    """What to do; empty where nothing is wanting."""

    def __str__(self) -> str:
        return f"{self.state:<8} {self.name:<13} {self.found}" + (f": {self.remedy}" if self.remedy else "")


def examine() -> list[Check]:
    """All checks, on this machine. Takes seconds: torch is imported, in another process."""
    facts, smi = probe(), nvidia_smi()
    card = facts["cuda"]
    return [
        python(sys.version_info[:3]),
        library("torch", facts["torch"]),
        torchvision(facts["torchvision"], facts["torch"]),
        library("transformers", facts["transformers"]),
        cuda(card, smi),
        triton(facts["triton"], card, compiler()),
        link(smi),
        page_locked(card, memlock_limit()),
        host_memory(facts["host"]),
        codecs(facts["codecs"]),
        matplotlib(),
    ]


# ---- looking


def probe(command: tuple[str, ...] = ("-P", "-m", "tieredkv.doctor.probe")) -> dict[str, Facts]:
    """Facts by section of `doctor_probe`. The one in which its process ended says so; those after it are not known."""
    from tieredkv.doctor.probe import SECTIONS

    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
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
            "error": f"importing it {end}" if name == missing[0] else "not known, after the one that crashed"
        }
    return facts


def _how_it_ended(code: int) -> str:
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    return f"ended Python with exit code {code}"


def nvidia_smi() -> dict[str, str]:
    """What `nvidia-smi` tells of the first card's driver and link; nothing where there is none."""
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


LINK = ("gen.current", "gen.max", "width.current", "width.max")


def compiler(environment: Mapping[str, str] = os.environ) -> str | None:
    """The C compiler that Triton would take."""
    return environment.get("CC") or shutil.which("gcc") or shutil.which("clang")


def memlock_limit() -> int | None:
    """`ulimit -l` in bytes, None for no limit, or where a system knows none."""
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


# ---- judging


def python(found: tuple[int, ...]) -> Check:
    """Python's own version."""
    text = ".".join(map(str, found))
    if found[:2] < FLOORS["python"]:
        return Check("python", "problem", text, f"use {_text(FLOORS['python'])} or newer")
    return Check("python", "ok", text)


def library(name: str, facts: Facts) -> Check:
    """A library that must be there, import, and be new enough."""
    floor = _text(FLOORS[name])
    if "error" in facts:
        return Check(name, "problem", facts["error"], f'pip install "{name}>={floor}"')
    if _numbers(facts["version"]) < FLOORS[name]:
        return Check(name, "problem", facts["version"], f'too old: pip install --upgrade "{name}>={floor}"')
    return Check(name, "ok", facts["version"])


def torchvision(facts: Facts, torch: Facts) -> Check:
    """torchvision, which works only beside the torch that it was built for."""
    error = facts.get("error", "")
    if "torchvision::" not in error and "undefined symbol" not in error:
        return library("torchvision", facts)
    kind = torch.get("version", "").partition("+")[2]
    remedy = "pip install --force-reinstall torch torchvision" + (f" --index-url {INDEX}/{kind}" if kind else "")
    return Check("torchvision", "problem", f"does not fit torch {torch.get('version', '')} ({error})", remedy)


def cuda(facts: Facts, smi: Mapping[str, str]) -> Check:
    """The card, its driver, and whether torch can use it."""
    name = smi.get("name")
    if "name" in facts:
        driver = f", driver {smi['driver_version']}" if "driver_version" in smi else ""
        capability = tuple(facts["capability"])
        found = (
            f"{facts['name']}, compute capability {_text(capability)}, {_gib(facts['free'])} of "
            f"{_gib(facts['total'])} GiB free, CUDA {facts['build']}{driver}"
        )
        if capability < KERNELS_FROM:
            return Check("card", "note", found, f"the kernels are made for {_text(KERNELS_FROM)} and newer")
        return Check("card", "ok", found)
    if "error" in facts:
        return Check("card", "problem", facts["error"], "mend what is a problem above first")
    if name and facts["build"] is None:
        remedy = "take torch and torchvision for CUDA, as https://pytorch.org/get-started says"
        return Check("card", "problem", f"{name}, but torch is built without CUDA", remedy)
    if name:
        why = facts.get("why", "torch does not say why")
        remedy = "update its driver, and look at CUDA_VISIBLE_DEVICES"
        return Check("card", "problem", f"{name}, but torch cannot use it ({why})", remedy)
    return Check("card", "note", "no CUDA device", "everything runs on the CPU, slowly for large models")


def triton(facts: Facts, card: Facts, compiler: str | None) -> Check:
    """Triton, and the C compiler that it needs; both only with a card."""
    here = "name" in card
    if "error" in facts:
        if not here:
            return Check("triton", "ok", f"{facts['error']}; only a card needs it")
        return Check("triton", "note", facts["error"], "pip install triton; until then decoding is slower")
    if compiler is None:
        state: Literal["note", "problem"] = "problem" if here else "note"
        return Check("triton", state, f"{facts['version']}, no C compiler", "install gcc or clang, or set CC")
    return Check("triton", "ok", f"{facts['version']}, compiles with {compiler}")


def link(smi: Mapping[str, str]) -> Check:
    """Generation and width of the bus to the card."""
    numbers = {what: smi.get(f"pcie.link.{what}", "") for what in LINK}
    if not all(number.isdigit() for number in numbers.values()):
        return Check("link", "ok", "not known: there is no card, or nvidia-smi does not tell")
    generation, most_generation, width, most_width = map(int, numbers.values())
    found = f"PCIe {most_generation} x{width}"
    if generation < most_generation:
        found += f" (at {generation} now, as cards at rest are)"
    if width < most_width:
        times = most_width / width
        return Check(
            "link", "note", f"{found} of x{most_width}", f"copies take {times:g} times as long: try another slot"
        )
    return Check("link", "ok", found)


def page_locked(card: Facts, limit: int | None) -> Check:
    """Whether host memory can be locked for the card to read."""
    bound = "no limit" if limit is None else f"limit {limit // 1024:,} KiB"
    if "name" not in card:
        return Check("page-locked", "ok", f"{bound}; tried only with a card")
    if refusal := card["lock_refusal"]:
        remedy = "raise `ulimit -l` or the container's limit; until then chunks are copied through the host, slowly"
        return Check("page-locked", "problem", f"refused ({refusal}), {bound}", remedy)
    return Check("page-locked", "ok", f"works, {bound}")


def host_memory(facts: Facts) -> Check:
    """Host memory that may be taken, within the container's limit."""
    if "error" in facts:
        return Check("host memory", "note", facts["error"], "mend what is a problem above first")
    allowed, machine = facts["allowed"], facts["machine"]
    found = f"{_gib(allowed)} GiB available"
    if allowed < machine:
        found += f", of the machine's {_gib(machine)} (its control group's limit)"
    if allowed < LEAST_HOST:
        return Check("host memory", "problem", found, "end other programs, or raise the container's limit")
    return Check("host memory", "ok", found)


def codecs(facts: Facts) -> Check:
    """What videos can be decoded."""
    if "error" in facts:
        return Check("codecs", "problem", facts["error"], "pip install --force-reinstall av")
    if missing := [name for name, there in facts.items() if not there]:
        remedy = "pip install --force-reinstall av, as a wheel, or convert such videos to h264"
        return Check("codecs", "problem", f"no decoder for {', '.join(missing)}", remedy)
    return Check("codecs", "ok", ", ".join(facts))


def matplotlib(name: str = "matplotlib") -> Check:
    """What draws the demo's picture."""
    try:
        return Check("matplotlib", "ok", version(name))
    except PackageNotFoundError:
        return Check("matplotlib", "note", "not installed", 'pip install "tieredkv[plot]" to draw')


def _numbers(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
