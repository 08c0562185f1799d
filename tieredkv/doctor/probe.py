"""Facts about this machine that need imports, gathered in a process of their own, as an import may crash.

`python -m tieredkv.doctor.probe` prints a line of JSON for each section, `{name: facts}`, as soon as it is known. A
section that fails has one fact, "error".
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

LOCKED_BYTES = 2**26
"""Bytes of host memory that are page-locked as a test."""
DECODERS = {
    "h264": ("h264",),
    "hevc": ("hevc",),
    "vp9": ("vp9", "libvpx-vp9"),
    "av1": ("libdav1d", "libaom-av1"),  # FFmpeg's own decoder works on cards only
}


def library(name: str) -> dict[str, Any]:
    """Version of a library, if it can be imported."""
    facts: dict[str, Any] = {}
    try:
        facts["version"] = version(name)
    except PackageNotFoundError:
        return {"error": "not installed"}
    import_module(name)
    return facts


def cuda() -> dict[str, Any]:
    """The first device that torch sees, and whether host memory can be page-locked for it."""
    import torch

    facts: dict[str, Any] = {"build": torch.version.cuda}
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            facts["why"] = str(error).strip().splitlines()[0]
        return facts
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    facts |= {"name": properties.name, "capability": [properties.major, properties.minor], "free": free, "total": total}

    from tieredkv.memory.pagelock import PageLocker, aligned

    locker = PageLocker()
    locker.use(torch.device("cuda", 0))
    locker.lock(aligned((LOCKED_BYTES,), torch.uint8))
    facts["lock_refusal"] = locker.refusal()
    locker.close()
    return facts


def kernels() -> dict[str, Any]:
    """By package with kernels that some models need to be fast: its version, if it is installed, and the models."""
    from tieredkv.models import families

    facts: dict[str, Any] = {}
    for decoder in families.DECODERS:
        for package in decoder.packages:
            found = facts.setdefault(package, {"version": None, "models": []})
            found["models"] += decoder.model_types
            with suppress(PackageNotFoundError):
                found["version"] = version(package)
    return facts


def host() -> dict[str, Any]:
    """Bytes of host memory available on the machine, and to this process."""
    import psutil

    from tieredkv.memory.limits import available_host_bytes

    return {"machine": psutil.virtual_memory().available, "allowed": available_host_bytes()}


def codecs() -> dict[str, Any]:
    """Which of the common codecs PyAV's FFmpeg can decode."""
    import av

    def decodes(name: str) -> bool:
        try:
            return av.Codec(name, "r") is not None
        except ValueError:
            return False

    return {codec: any(map(decodes, names)) for codec, names in DECODERS.items()}


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": lambda: library("torch"),
    "torchvision": lambda: library("torchvision"),
    "transformers": lambda: library("transformers"),
    "triton": lambda: library("triton"),
    "kernels": kernels,
    "codecs": codecs,
    "host": host,
    "cuda": cuda,
}


def main() -> None:
    for name, section in SECTIONS.items():
        try:
            facts = section()
        except Exception as error:  # noqa: BLE001 a broken import may raise anything; it is reported
            facts = {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
        print(json.dumps({name: facts}), flush=True)


if __name__ == "__main__":
    main()
