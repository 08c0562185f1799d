"""The checks of `tieredkv doctor`: each is ok, a note or a problem, and says what to do.

Imports neither torch nor anything that imports it: `tieredkv.doctor.probe` does that in another process.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from tieredkv.doctor.facts import LINK, Facts, compiler, memlock_limit, nvidia_smi, probe
from tieredkv.memory.units import GIB

FLOORS = {"python": (3, 11), "torch": (2, 11), "torchvision": (0, 26), "transformers": (5, 17)}
"""The oldest supported versions, as in pyproject.toml."""
LEAST_HOST = GIB
"""Bytes of host memory below which nothing useful fits."""
FIX_FIRST = "fix the problems above first"
KERNELS_FROM = (8, 0)
"""Least compute capability for the Triton kernels."""
INDEX = "https://download.pytorch.org/whl"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    state: Literal["ok", "note", "problem"]
    found: str
    remedy: str = ""
    """What to do; empty if nothing is wrong."""

    def __str__(self) -> str:
        return f"{self.state:<8} {self.name:<13} {self.found}" + (f": {self.remedy}" if self.remedy else "")


def examine() -> list[Check]:
    """All checks of this machine. Takes seconds, as torch is imported in another process."""
    facts, smi = probe(), nvidia_smi()
    card = facts["cuda"]
    return [
        python(sys.version_info[:3]),
        library("torch", facts["torch"]),
        torchvision(facts["torchvision"], facts["torch"]),
        library("transformers", facts["transformers"]),
        cuda(card, smi),
        triton(facts["triton"], card, compiler()),
        kernels(facts["kernels"], card),
        link(smi),
        page_locked(card, memlock_limit()),
        host_memory(facts["host"]),
        codecs(facts["codecs"]),
        matplotlib(),
    ]


def python(running: tuple[int, ...]) -> Check:
    """Python's own version."""
    text = ".".join(map(str, running))
    if running[:2] < FLOORS["python"]:
        return Check("python", "problem", text, f"use {_text(FLOORS['python'])} or newer")
    return Check("python", "ok", text)


def library(name: str, facts: Facts) -> Check:
    """A library that must be installed, importable and new enough."""
    floor = _text(FLOORS[name])
    if "error" in facts:
        return Check(name, "problem", facts["error"], f'pip install "{name}>={floor}"')
    if _numbers(facts["version"]) < FLOORS[name]:
        return Check(name, "problem", facts["version"], f'too old: pip install --upgrade "{name}>={floor}"')
    return Check(name, "ok", facts["version"])


def torchvision(facts: Facts, torch: Facts) -> Check:
    """torchvision, which works only with the release of torch that it was built for."""
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
        text = (
            f"{facts['name']}, compute capability {_text(capability)}, {_gib(facts['free'])} of "
            f"{_gib(facts['total'])} GiB free, CUDA {facts['build']}{driver}"
        )
        if capability < KERNELS_FROM:
            return Check("card", "note", text, f"the kernels need {_text(KERNELS_FROM)} or newer")
        return Check("card", "ok", text)
    if "error" in facts:
        return Check("card", "problem", facts["error"], FIX_FIRST)
    if name and facts["build"] is None:
        remedy = "install torch and torchvision for CUDA, as https://pytorch.org/get-started says"
        return Check("card", "problem", f"{name}, but torch is built without CUDA", remedy)
    if name:
        why = facts.get("why", "torch gives no reason")
        remedy = "update its driver, and check CUDA_VISIBLE_DEVICES"
        return Check("card", "problem", f"{name}, but torch cannot use it ({why})", remedy)
    return Check("card", "note", "no CUDA device", "everything runs on the CPU, which is slow for large models")


def triton(facts: Facts, card: Facts, compiler: str | None) -> Check:
    """Triton and the C compiler that it needs, both only with a card."""
    here = "name" in card
    if "error" in facts:
        if not here:
            return Check("triton", "ok", f"{facts['error']}; needed only with a card")
        return Check("triton", "note", facts["error"], "pip install triton; without it decoding is slower")
    if compiler is None:
        state: Literal["note", "problem"] = "problem" if here else "note"
        return Check("triton", state, f"{facts['version']}, no C compiler", "install gcc or clang, or set CC")
    return Check("triton", "ok", f"{facts['version']}, compiles with {compiler}")


def kernels(facts: Facts, card: Facts) -> Check:
    """Packages without which transformers runs layers of some models slowly."""
    if "error" in facts:
        return Check("kernels", "note", facts["error"], FIX_FIRST)
    missing = [name for name, found in facts.items() if found["version"] is None]
    if not missing:
        return Check("kernels", "ok", ", ".join(f"{name} {found['version']}" for name, found in facts.items()))
    text = f"no {', '.join(missing)}"
    if "name" not in card:
        return Check("kernels", "ok", f"{text}; needed only with a card")
    models = ", ".join(dict.fromkeys(kind for name in missing for kind in facts[name]["models"]))
    return Check("kernels", "note", text, f"pip install {' '.join(missing)}; without it {models} are slower")


def link(smi: Mapping[str, str]) -> Check:
    """Generation and width of the bus to the card."""
    numbers = {what: smi.get(f"pcie.link.{what}", "") for what in LINK}
    if not all(number.isdigit() for number in numbers.values()):
        return Check("link", "ok", "unknown: there is no card, or nvidia-smi does not report it")
    generation, most_generation, width, most_width = map(int, numbers.values())
    text = f"PCIe {most_generation} x{width}"
    if generation < most_generation:
        text += f" (at {generation} now, as usual for an idle card)"
    if width < most_width:
        times = most_width / width
        return Check(
            "link", "note", f"{text} of x{most_width}", f"copies take {times:g} times as long: try another slot"
        )
    return Check("link", "ok", text)


def page_locked(card: Facts, limit: int | None) -> Check:
    """Whether host memory can be page-locked for the card."""
    bound = "no limit" if limit is None else f"limit {limit // 1024:,} KiB"
    if "name" not in card:
        return Check("page-locked", "ok", f"{bound}; tried only with a card")
    if refusal := card["lock_refusal"]:
        remedy = "raise `ulimit -l` or the container's limit; until then chunks are copied by the host, which is slow"
        return Check("page-locked", "problem", f"refused ({refusal}), {bound}", remedy)
    return Check("page-locked", "ok", f"works, {bound}")


def host_memory(facts: Facts) -> Check:
    """Host memory available, within the container's limit."""
    if "error" in facts:
        return Check("host memory", "note", facts["error"], FIX_FIRST)
    allowed, machine = facts["allowed"], facts["machine"]
    text = f"{_gib(allowed)} GiB available"
    if allowed < machine:
        text += f", of the machine's {_gib(machine)} (the limit of its control group)"
    if allowed < LEAST_HOST:
        return Check("host memory", "problem", text, "close other programs, or raise the container's limit")
    return Check("host memory", "ok", text)


def codecs(facts: Facts) -> Check:
    """Which videos can be decoded."""
    if "error" in facts:
        return Check("codecs", "problem", facts["error"], "pip install --force-reinstall av")
    if missing := [name for name, decodes in facts.items() if not decodes]:
        remedy = "pip install --force-reinstall av, as a wheel, or convert such videos to h264"
        return Check("codecs", "problem", f"no decoder for {', '.join(missing)}", remedy)
    return Check("codecs", "ok", ", ".join(facts))


def matplotlib(name: str = "matplotlib") -> Check:
    """matplotlib, which draws the demo's picture."""
    try:
        return Check("matplotlib", "ok", version(name))
    except PackageNotFoundError:
        return Check("matplotlib", "note", "not installed", 'needed for demo --plot only: pip install "tieredkv[plot]"')


def _numbers(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
