"""The rate of the link between host and card: measured once per machine, then read from a file."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

NBYTES = 2**24
"""Of a copy: enough for the link's full rate, little enough for any card."""
WARM_S, COPIES = 0.03, 8
"""Seconds of copies before any is timed, as an idle link runs at a lower rate; and how many are then timed."""


def cache_file() -> Path:
    """Where rates are kept: in `$TIEREDKV_CACHE`, by default `tieredkv` in `$XDG_CACHE_HOME` or `~/.cache`."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get("TIEREDKV_CACHE") or caches / "tieredkv") / "links.json"


def card_link_gb_s(card: torch.device, file: Path | None = None) -> float:
    """GB/s (1e9 bytes) of one large copy from page-locked memory to a CUDA device. file: None: `cache_file`."""
    return remembered(cache_file() if file is None else file, _name(card), lambda: _measure_card(card))


def remembered(file: Path, name: str, measure: Callable[[], float]) -> float:
    """The rate that a file has under a name; otherwise it is measured and added. A file that cannot be read or written
    is no error: the rate is then measured by every process."""
    rates = _read(file)
    rate = rates.get(name)
    if isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate < 1e6:
        return float(rate)
    rates[name] = rate = measure()
    _write(file, rates)
    return rate


def measure(copy: Callable[[], object], nbytes: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """GB/s of the fastest of `COPIES` copies. copy: of `nbytes`; returns once they have arrived. clock: seconds."""
    start = clock()
    copy()
    while clock() - start < WARM_S:
        copy()
    times = []
    for _ in range(COPIES):
        begin = clock()
        copy()
        times.append(clock() - begin)
    return nbytes / max(min(times), 1e-9) / 1e9


def _measure_card(card: torch.device) -> float:
    host = torch.empty(NBYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
    arrived = torch.empty(NBYTES, dtype=torch.uint8, device=card)
    stream = torch.cuda.current_stream(card)

    def copy() -> None:
        arrived.copy_(host, non_blocking=True)
        stream.synchronize()  # not the device: another session may be capturing a graph on it

    return measure(copy, NBYTES)


def _name(card: torch.device) -> str:
    """Card, driver and place on the bus, any of which may change the link."""
    found = torch.cuda.get_device_properties(card)
    bus = [getattr(found, f"pci_{part}_id", "?") for part in ("domain", "bus", "device")]
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "?")()
    return f"{found.name}, driver {driver}, bus {':'.join(map(str, bus))}"


def _read(file: Path) -> dict[str, object]:
    try:
        rates = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return rates if isinstance(rates, dict) else {}


def _write(file: Path, rates: dict[str, object]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        number, written = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    except OSError:
        return
    try:
        with open(number, "w", encoding="utf-8") as out:
            json.dump(rates, out, indent=1)
        os.replace(written, file)  # whole, whoever else writes it
    except OSError:
        Path(written).unlink(missing_ok=True)
