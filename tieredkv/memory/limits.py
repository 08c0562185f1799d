"""Host memory: how much this process may still allocate, given the machine and its control groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tieredkv.errors import BudgetError
from tieredkv.memory.units import GIB, different_sizes

SAFE_SHARE = 0.8
"""Share of the available memory to use if `host_kv_gb` is None; video decoding and torch need the rest."""
PROC_CGROUP = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")
Names = tuple[str, str, str]
"""Names of a control group's files for its limit and its usage, and the line of its `memory.stat` that counts
reclaimable page cache."""
VERSION_2: Names = ("memory.max", "memory.current", "inactive_file")
VERSION_1: Names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_host_bytes(proc_cgroup: Path = PROC_CGROUP, cgroup_root: Path = CGROUP_ROOT) -> int:
    """Bytes this process may still allocate: the least of what the machine and its control groups leave.

    proc_cgroup: the file that names this process's groups. cgroup_root: where they are mounted. A file that is absent
    or unreadable sets no limit. Page cache that the kernel drops on demand counts as free.
    """
    left = psutil.virtual_memory().available
    for group, (limit, usage, inactive) in _groups(proc_cgroup, cgroup_root):
        most, used = _number(group / limit), _number(group / usage)
        if most is not None and used is not None:
            reclaimable = _field(group / "memory.stat", inactive) or 0
            left = min(left, max(0, most - max(0, used - reclaimable)))
    return left


def host_budget_bytes(host_kv_gb: float | None, available: int | None = None) -> int:
    """Bytes the complete cache may take: the user's cap, or the safe share of `available` (None: measured now)."""
    if host_kv_gb is not None:
        return int(host_kv_gb * GIB)
    return int(SAFE_SHARE * (available_host_bytes() if available is None else available))


def check_host(
    needed_bytes: int,
    host_kv_gb: float | None,
    what: str,
    remedy: str | Callable[[int], str],
    available: int | None = None,
    allocated_bytes: int = 0,
) -> None:
    """Raise `BudgetError` when `needed_bytes` of host memory for `what` exceed what is allowed or available.

    host_kv_gb: the user's cap; None allows the safe share of what is available. remedy: advice for the message, or a
    function of the allowed bytes that returns it, called only on refusal. available: bytes (None: measured now).
    allocated_bytes: part of `needed_bytes` that is allocated already, and so not in `available`.
    """
    available = allocated_bytes + (available_host_bytes() if available is None else available)
    cap = host_budget_bytes(host_kv_gb, available)
    if needed_bytes <= min(cap, available):
        return
    allowed = min(cap, available)
    needs, most = _as_different_gib(needed_bytes, allowed)
    if host_kv_gb is None:
        limit = f"{most} may be used ({SAFE_SHARE:.0%} of what is available)"
    elif cap <= available:
        limit = f"host_kv_gb allows {most}"
    else:
        limit = f"{most} is available"
    raise BudgetError(
        f"{what} needs {needs} GiB of host memory, {limit}: {remedy(allowed) if callable(remedy) else remedy}."
    )


def check_host_memory(
    needed_bytes: int, what: str, remedy: str | Callable[[int], str], available: int | None = None
) -> None:
    """Raise `BudgetError` when `needed_bytes` for `what` exceed the memory that is available. The rest as for
    `check_host`."""
    available = available_host_bytes() if available is None else available
    if needed_bytes > available:
        needs, free = different_sizes(needed_bytes, available)
        advice = remedy(available) if callable(remedy) else remedy
        raise BudgetError(f"{what} needs {needs} of host memory, {free} is available: {advice}.")


def _groups(proc_cgroup: Path, root: Path) -> Iterator[tuple[Path, Names]]:
    """Folders of the control groups this process is in, the innermost first, and the names of their files."""
    try:
        lines = proc_cgroup.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        names = VERSION_1 if controllers else VERSION_2
        # In a container the path may be the host's; the process's own group is then the root it sees.
        parts = [part for part in path.split("/") if part]
        parts = [] if ".." in parts else parts
        mount = root / "memory" if controllers else root
        for depth in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:depth]), names


def _number(path: Path) -> int | None:
    """The integer in a file; None for "max", or if there is none to read."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _field(path: Path, name: str) -> int | None:
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
        return next((int(row[1]) for row in rows if len(row) == 2 and row[0] == name), None)
    except (OSError, ValueError):
        return None


def _as_different_gib(more: int, less: int) -> tuple[str, str]:
    """Two sizes in GiB, both with the fewest digits, at least three, in which they differ."""
    texts = ("", "")
    for digits in range(3, 17):
        texts = _digits(more / GIB, digits), _digits(less / GIB, digits)
        if texts[0] != texts[1]:
            break
    return texts


def _digits(value: float, digits: int) -> str:
    return f"{value:.{max(digits, len(str(int(value))))}g}"
