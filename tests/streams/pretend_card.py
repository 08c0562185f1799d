"""A card with values: tensors in host memory that say they are on a CUDA device, and a list of what would wait for it.

Unlike torch's fake tensors these can be computed with, so what depends on values on the host runs as it is: classifying
heads, planning, filling a pool.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tieredkv.codecs.base import Fit
from tieredkv.ops.base import Pages, Source
from tieredkv.ops.select import TORCH, OpTable

CARD = torch.device("cuda", 0)
WAITING = {
    "item", "tolist", "numpy", "nonzero", "masked_select", "unique", "repeat_interleave", "equal", "allclose",
    "__bool__", "__int__", "__float__", "__index__", "__contains__",
}  # fmt: skip
"""Functions that bring a value of the card to the host, or whose result's size depends on one."""


class OnCard(torch.Tensor):
    """A tensor on the card."""


def _is_card(thing: Any) -> bool:
    return isinstance(thing, OnCard)


def _plain(thing: Any) -> Any:
    return thing.as_subclass(torch.Tensor) if _is_card(thing) else thing


def _on_card(thing: Any) -> Any:
    return thing.as_subclass(OnCard) if isinstance(thing, torch.Tensor) else thing


def _device_of(arguments: Any) -> torch.device | None:
    for each in arguments:
        if isinstance(each, torch.device | str):
            return torch.device(each)
        if isinstance(each, torch.Tensor):
            return CARD if _is_card(each) else torch.device("cpu")
    return None


class PretendCard(TorchFunctionMode):
    """Inside the block, tensors may be created on `CARD` and copied to it. `waits`: what waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        if func == torch.Tensor.device.__get__:
            return CARD if _is_card(args[0]) else func(*args)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        card = any(map(_is_card, tensors))
        if name in ("to", "cpu"):
            return self._moved(func, args, kwargs)
        if name == "copy_":
            self._copy(_is_card(args[1]), _is_card(args[0]), kwargs)
        elif name in ("__getitem__", "__setitem__"):
            self._index(name, *args)
        elif card and name in WAITING:
            self.waits.append(name)
        elif card and any(not _is_card(each) and each.dim() for each in tensors):
            raise AssertionError(f"{name} of tensors on the host and on the card")
        if "device" in kwargs:
            card = kwargs["device"] is not None and torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = "cpu"
        out = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        return tree_map(_on_card, out) if card else out

    def _copy(self, from_card: bool, to_card: bool, kwargs: dict[str, Any]) -> None:
        if from_card != to_card and not (to_card and kwargs.get("non_blocking")):
            self.waits.append("copy to the host" if from_card else "copy to the card")

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """`to` and `cpu`."""
        source, *others = args
        device = torch.device("cpu") if func is torch.Tensor.cpu else _device_of((kwargs.get("device"), *others))
        to_card = _is_card(source) if device is None else device.type == "cuda"
        self._copy(_is_card(source), to_card, kwargs)
        dtypes = [each for each in (*others, kwargs.get("dtype")) if isinstance(each, torch.dtype)]
        moved = _plain(source).to(*dtypes)
        if _is_card(source) != to_card:
            moved = moved.clone()
        return _on_card(moved) if to_card else moved

    def _index(self, name: str, source: torch.Tensor, index: Any, value: Any = None) -> None:
        indices = [leaf for leaf in tree_leaves(index) if isinstance(leaf, torch.Tensor)]
        if not _is_card(source):
            assert not any(map(_is_card, [*indices, value])), f"{name} of a tensor on the host by one on the card"
            return
        if any(each.dtype == torch.bool for each in indices):
            self.waits.append(f"{name} by a mask")
        if any(not _is_card(each) and each.dim() for each in (*indices, value) if isinstance(each, torch.Tensor)):
            self.waits.append(f"{name} by a tensor on the host")


def pretend_kernels(launched: list[str]) -> OpTable:
    """Operations that fill a pool as the kernels do, without waiting; their names are added to `launched`."""

    def plain(pages: Pages) -> Pages:
        fit = pages.fit
        if fit is not None:
            fit = Fit(_plain(fit.centre), _plain(fit.channels))
        return Pages(pages.codec, _plain(pages.records), fit)

    def filling(name: str) -> Any:
        def run(source: Source, pages: Pages, *arguments: Any) -> None:
            launched.append(name)
            for each in arguments:
                if isinstance(each, torch.Tensor):
                    each.to(CARD, non_blocking=True)  # as the kernels' wrappers do
            assert _is_card(pages.records)
            with torch._C.DisableTorchFunction():
                getattr(TORCH, name)(source, plain(pages), *map(_plain, arguments))

        return run

    return dataclasses.replace(TORCH, name="pretended", fetch=filling("fetch"), keep=filling("keep"))
