"""Time and launches of a step's kernels, from torch's profiler."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from gpu_record import Run, Values

KERNELS = 14
"""Kernels of a profile that are recorded, by time."""


def profile(run: Run, step: Callable[[], object], rounds: int = 4) -> Values:
    """Time and launches of a step's kernels: all together, and by kernel, the slowest first. rounds: how many steps."""
    activity = torch.profiler.ProfilerActivity.CPU if run.dry else torch.profiler.ProfilerActivity.CUDA
    rounds = 1 if run.dry else rounds
    with torch.profiler.profile(activities=[activity]) as profiled:
        for _ in range(rounds):
            step()
        run.synchronize()
    spent: dict[str, tuple[float, int]] = {}
    for event in profiled.key_averages():
        took = event.self_cpu_time_total if run.dry else event.self_device_time_total
        if took > 0:
            us, launches = spent.get(short(event.key), (0.0, 0))
            spent[short(event.key)] = us + took, launches + event.count
    slowest = sorted(spent.items(), key=lambda item: -item[1][0])[:KERNELS]
    return {
        "kernel_us": sum(us for us, _ in spent.values()) / rounds,
        "launches": sum(launches for _, launches in spent.values()) / rounds,
        "kernels": [[name, us / rounds, launches / rounds] for name, (us, launches) in slowest],
    }


def short(name: str) -> str:
    """A kernel's name without namespaces and types, but with the function that a generic one applies."""
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    head = re.split(r"[<(]", plain)[0].split("::")[-1]
    applied = re.findall(r"(\w*(?:[Ff]unctor|_kernel_cuda|_kernel_impl|Op)\w*)", plain[len(head) :])
    return (head if not applied or applied[0] == head else f"{head}:{applied[0]}")[:60]
