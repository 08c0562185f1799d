"""What `tieredkv.doctor.checks` looks at by importing it, in a process of its own: an import may fail, or crash.

`python -m tieredkv.doctor.probe` prints a line of JSON per section, `{name: facts}`, as soon as it has them; facts with
an "error" say why there are no others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

LOCKED_BYTES = 2**26
"""Host memory that is page-locked to see whether it can be."""
DECODERS = {
    "h264": ("h264",),
    "hevc": ("hevc",),
    "vp9": ("vp9", "libvpx-vp9"),
    "av1": ("libdav1d", "libaom-av1"),  # FFmpeg's own decodes on cards only
}


def library(name: str) -> dict[str, Any]:
    """Version of a library that imports."""
    facts: dict[str, Any] = {}
    try:
        facts["version"] = version(name)
    except PackageNotFoundError:
        return {"error": "not installed"}
    import_module(name)
    return facts


def cuda() -> dict[str, Any]:
    """The first device as torch sees it, with whether host memory can be page-locked for it."""
    import torch

    facts: dict[str, Any] = {"build": torch.version.cuda}
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            facts["why"] = str(error).strip().splitlines()[0]
        return facts
    about = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    facts |= {"name": about.name, "capability": [about.major, about.minor], "free": free, "total": total}

    from tieredkv.memory.pagelock import PageLocker, aligned

    locker = PageLocker()
    locker.use(torch.device("cuda", 0))
    locker.lock(aligned((LOCKED_BYTES,), torch.uint8))
    facts["lock_refusal"] = locker.refusal()
    locker.close()
    return facts


def host() -> dict[str, Any]:
    """Bytes of host memory: what the machine has available, and what of it this process may take."""
    import psutil

    from tieredkv.memory.limits import available_host_bytes

    return {"machine": psutil.virtual_memory().available, "allowed": available_host_bytes()}


def codecs() -> dict[str, Any]:
    """Which of the usual codecs PyAV's FFmpeg can decode."""
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
    "codecs": codecs,
    "host": host,
    "cuda": cuda,
}


def main() -> None:
    for name, look in SECTIONS.items():
        try:
            facts = look()
        except Exception as error:  # noqa: BLE001 what is broken may raise anything, and is what is reported
            facts = {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
        print(json.dumps({name: facts}), flush=True)


if __name__ == "__main__":
    main()
