"""Weights as they are stored, by quantisation libraries as several plain tensors, and the modules they are in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from tieredkv.errors import UnsupportedModelError

_COLUMNS = 4096  # of 8-byte words
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def plain_tensors(tensor: torch.Tensor, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors that a weight consists of, each with a text that says what it is; nothing is dequantised.

    name: of the weight. The texts hold all else that the weight is, such as block sizes, and no address.
    """
    kind: Any = type(tensor)
    if hasattr(kind, "__tensor_flatten__"):  # torch's own protocol for wrapped tensors, which torchao follows
        parts, context = kind.__tensor_flatten__(tensor)
        about = f"{name} {kind.__name__} {tuple(tensor.shape)} {tensor.dtype} {_ADDRESS.sub('', repr(context))}"
        for part in sorted(parts):
            yield from plain_tensors(getattr(tensor, part), f"{about} {part}")
    else:
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype}", tensor.detach().as_subclass(torch.Tensor)


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes that a weight takes in memory."""
    return sum(part.nbytes for _, part in plain_tensors(tensor))


def entries(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of `model.state_dict()`, sorted; modules may keep other things in it, as bytes or as text."""
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            data = value.getvalue() if hasattr(value, "getvalue") else value
            octets = data if isinstance(data, bytes) else _ADDRESS.sub("", repr(data)).encode()
            value = torch.frombuffer(bytearray(octets or b"\0"), dtype=torch.uint8)
        yield name, value


def tensors_hash(found: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Of every bit of named tensors. Raises `UnsupportedModelError` for one without memory (torch's meta device)."""
    made = hashlib.sha256()
    for name, tensor in found:
        for about, part in plain_tensors(tensor, name):
            if part.device.type == "meta":
                raise UnsupportedModelError(f"weight {name} is not in memory (device meta): load the whole model.")
            made.update(f"{about}\n".encode())
            for sums in _sums(part):
                made.update(sums)
    return made.hexdigest()


def _sums(tensor: torch.Tensor) -> Iterator[bytes]:
    """Bytes that stand for all bits of a tensor, computed on its device without a copy of it.

    The tensor is read as a table of 8-byte words, summed as integers modulo 2**64 down columns and along rows; what
    fills no row is given as it is. One changed word changes its row's sum and its column's. Of two changed words, as
    after a swap, either both columns' sums change or, in one column, both rows'. Integer sums do not depend on the
    order of adding, so every device and thread count gives the same.
    """
    octets = tensor.detach().reshape(-1).view(torch.uint8)  # copies where the weight is not contiguous
    if octets.storage_offset() % 8:
        octets = octets.clone()  # words cannot start there
    whole = octets.numel() - octets.numel() % (8 * _COLUMNS)
    if whole:
        table = octets[:whole].view(torch.int64).view(-1, _COLUMNS)
        yield torch.cat([table.sum(0), table.sum(1)]).cpu().numpy().tobytes()
    yield octets[whole:].cpu().numpy().tobytes()


def modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """As `model.named_modules()`, which takes several times as long where adapters make models deep."""
    found: dict[torch.nn.Module, str] = {}
    waiting: list[tuple[str, torch.nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module not in found:
            found[module] = path
            prefix = f"{path}." if path else ""
            inside = [(prefix + own, of) for own, of in module._modules.items() if of is not None]
            waiting += reversed(inside)
    return [(path, module) for module, path in found.items()]
