"""Which operations run on a device: Triton's kernels on a card, those compiled by Numba on a CPU, plain torch where
neither is installed."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tieredkv.ops import torch_ops
from tieredkv.ops.base import Expected, Ops
from tieredkv.policy import select
from tieredkv.policy.digests import Digest


@dataclass(frozen=True, slots=True)
class OpTable:
    """`Ops` assembled from functions; `dataclasses.replace` swaps some of them."""

    name: str
    capturable: bool
    preparations: Callable[[Expected], Iterable[Callable[[], object]]]
    digest: Callable[[Digest[Any]], Digest[Any]]
    chunk_ranks: Callable[..., torch.Tensor]
    log_mass_without: Callable[..., torch.Tensor]
    record_unseen: Callable[..., None]
    adapt: Callable[..., None]
    add_mass: Callable[..., None]
    choose: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    place: Callable[..., torch.Tensor]
    gather: Callable[..., None]
    fetch: Callable[..., None]
    append: Callable[..., None]
    keep: Callable[..., None]
    paged_attention: Callable[..., tuple[torch.Tensor, torch.Tensor]]


TORCH = OpTable(
    name="torch",
    capturable=False,
    preparations=lambda expected: (),
    digest=lambda digest: digest,
    chunk_ranks=select.chunk_ranks,
    log_mass_without=select.log_mass_without,
    record_unseen=torch_ops.record_unseen,
    adapt=torch_ops.adapt,
    add_mass=torch_ops.add_mass,
    choose=torch_ops.choose,
    place=torch_ops.place,
    gather=torch_ops.gather,
    fetch=torch_ops.fetch,
    append=torch_ops.append,
    keep=torch_ops.keep,
    paged_attention=torch_ops.paged_attention,
)


@cache
def triton() -> OpTable:
    """Triton's kernels. ImportError where Triton is not installed."""
    from tieredkv.ops.triton import adapt, ahead, attend, choose, copy, mass, rank

    return OpTable(
        name="triton",
        capturable=True,
        preparations=ahead.preparations,
        digest=rank.by_kernels,
        chunk_ranks=rank.chunk_ranks,
        log_mass_without=mass.log_mass_without,
        record_unseen=mass.record_unseen,
        adapt=adapt.adapt,
        add_mass=mass.add_mass,
        choose=choose.choose,
        place=choose.place,
        gather=copy.gather,
        fetch=copy.fetch,
        append=copy.append,
        keep=copy.keep,
        paged_attention=attend.paged_attention,
    )


@cache
def numba() -> OpTable:
    """Loops compiled by Numba for a CPU, and torch for the rest. ImportError where Numba is not installed, or does not
    know the installed version of NumPy."""
    from tieredkv.ops.numba import append, attend, choose, rank

    return replace(
        TORCH,
        name="numba",
        digest=rank.by_compiled,
        chunk_ranks=choose.chunk_ranks,
        log_mass_without=choose.log_mass_without,
        choose=choose.choose,
        place=choose.place,
        gather=choose.gather,
        append=append.append,
        paged_attention=attend.paged_attention,
    )


@cache
def _on_a_cpu() -> OpTable:
    try:
        return numba()
    except (ImportError, OSError):  # OSError: no room on disk for what it compiles
        return TORCH
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, ValueError) as error:  # a damaged cache
        warnings.warn(
            f"what Numba compiled cannot be used ({type(error).__name__}), so steps use torch, which is slower: delete "
            f"*.nbi and *.nbc in {Path(__file__).with_name('numba') / '__pycache__'}, or in Numba's cache.",
            stacklevel=2,
        )
        return TORCH


def ops_for(device: torch.device) -> OpTable:
    """The fastest operations on a device that are installed."""
    if device.type == "cuda":
        return triton() if find_spec("triton") is not None else TORCH
    return _on_a_cpu() if device.type == "cpu" else TORCH


def copying_by_torch(ops: Ops, how: str = "copies by torch") -> Ops:
    """The same operations with copies by torch, for a host tier that kernels cannot read: it is not page-locked, or not
    in memory. how: for messages."""
    same = {field.name: getattr(ops, field.name) for field in fields(OpTable)}
    copies = {"gather": TORCH.gather, "fetch": TORCH.fetch, "keep": TORCH.keep}
    return OpTable(**{**same, **copies, "name": f"{ops.name}, {how}", "capturable": False})
