"""Weights as they are stored (quantisation libraries use several plain tensors for one), and a model's modules."""

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
    """The plain tensors that a weight consists of, each with a description; nothing is dequantised.

    name: of the weight. Descriptions contain everything else about the weight, such as block sizes, without addresses.
    """
    kind: Any = type(tensor)
    if hasattr(kind, "__tensor_flatten__"):  # torch's protocol for wrapped tensors, used by torchao
        parts, context = kind.__tensor_flatten__(tensor)
        description = f"{name} {kind.__name__} {tuple(tensor.shape)} {tensor.dtype} {_ADDRESS.sub('', repr(context))}"
        for part in sorted(parts):
            yield from plain_tensors(getattr(tensor, part), f"{description} {part}")
    else:
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype}", tensor.detach().as_subclass(torch.Tensor)


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes that a weight takes in memory."""
    return sum(part.nbytes for _, part in plain_tensors(tensor))


def entries(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of `model.state_dict()`, sorted. Entries that are not tensors become tensors of bytes."""
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            data = value.getvalue() if hasattr(value, "getvalue") else value
            octets = data if isinstance(data, bytes) else _ADDRESS.sub("", repr(data)).encode()
            value = torch.frombuffer(bytearray(octets or b"\0"), dtype=torch.uint8)
        yield name, value


def tensors_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of every bit of named tensors. Raises `UnsupportedModelError` for a tensor on torch's meta device."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        for description, part in plain_tensors(tensor, name):
            if part.device.type == "meta":
                raise UnsupportedModelError(f"weight {name} is not in memory (device meta): load the whole model.")
            digest.update(f"{description}\n".encode())
            for sums in _sums(part):
                digest.update(sums)
    return digest.hexdigest()


def _sums(tensor: torch.Tensor) -> Iterator[bytes]:
    """Bytes that represent all bits of a tensor, computed on its device without a copy.

    The tensor is read as a table of 8-byte words, summed as integers modulo 2**64 over columns and rows; bytes that
    fill no row are returned as they are. One changed word changes the sums of its row and its column. Two changed
    words, as after a swap, change the sums of both columns or, if they share one, of both rows. Integer sums do not
    depend on the order of addition, so all devices and thread counts give the same bytes.
    """
    octets = tensor.detach().reshape(-1).view(torch.uint8)  # copies where the weight is not contiguous
    if octets.storage_offset() % 8:
        octets = octets.clone()  # a view of 8-byte words needs an aligned start
    whole = octets.numel() - octets.numel() % (8 * _COLUMNS)
    if whole:
        table = octets[:whole].view(torch.int64).view(-1, _COLUMNS)
        yield torch.cat([table.sum(0), table.sum(1)]).cpu().numpy().tobytes()
    yield octets[whole:].cpu().numpy().tobytes()


def modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """As `model.named_modules()`, which takes several times as long for models that adapters make deep."""
    paths: dict[torch.nn.Module, str] = {}
    stack: list[tuple[str, torch.nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        if module not in paths:
            paths[module] = path
            prefix = f"{path}." if path else ""
            children = [(prefix + name, child) for name, child in module._modules.items() if child is not None]
            stack += reversed(children)
    return [(path, module) for module, path in paths.items()]
