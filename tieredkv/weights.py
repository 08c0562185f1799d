"""Weights as they are stored: quantisation libraries hold one weight as several plain tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

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
