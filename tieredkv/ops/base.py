"""Ops: the operations of a decoding step, as one implementation offers them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tieredkv.ops import torch_ops
from tieredkv.policy import select
from tieredkv.policy.digests import sketch

Op = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Ops:
    """One implementation of each; what they do is said at the torch ones."""

    name: str
    capturable: bool = False
    """Whether none of them waits for the host, on a card: a step can then be captured in a graph."""
    pack_sketches: Op = sketch.pack
    sketch_logits: Op = sketch.sketch_logits
    chunk_ranks: Op = select.chunk_ranks
    choose: Op = torch_ops.choose
    place: Op = torch_ops.place
    gather: Op = torch_ops.gather
    fetch: Op = torch_ops.fetch
    append: Op = torch_ops.append
    keep: Op = torch_ops.keep
    paged_attention: Op = torch_ops.paged_attention
