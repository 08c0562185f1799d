"""The operations of a decoding step on a device: plain torch everywhere, Triton's kernels where they can run."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import torch

from tieredkv.ops.base import Ops

TORCH = Ops("torch")


@cache
def triton() -> Ops:
    """Triton's kernels. ImportError where there is no Triton."""
    from tieredkv.ops.triton import attend, choose, copy, rank

    return Ops(
        "triton",
        capturable=True,
        pack_sketches=rank.pack_sketches,
        sketch_logits=rank.sketch_logits,
        chunk_ranks=rank.chunk_ranks,
        choose=choose.choose,
        place=choose.place,
        gather=copy.gather,
        fetch=copy.fetch,
        append=copy.append,
        keep=copy.keep,
        paged_attention=attend.paged_attention,
    )


def ops_for(device: torch.device) -> Ops:
    """The fastest that runs on a device: kernels on a CUDA device with Triton, torch elsewhere."""
    return triton() if device.type == "cuda" and find_spec("triton") is not None else TORCH


def copying_by_torch(ops: Ops) -> Ops:
    """The same where no kernel can read the host tier, because it is not page-locked."""
    copies = {"gather": TORCH.gather, "fetch": TORCH.fetch, "keep": TORCH.keep}
    return replace(ops, name=f"{ops.name}, copies by torch", capturable=False, **copies)
