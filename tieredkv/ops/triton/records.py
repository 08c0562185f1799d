"""A pool's records as kernels read and write them."""

from __future__ import annotations

import torch

from tieredkv.codecs import PLAIN
from tieredkv.ops.base import Pages


def typed(pages: Pages) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Views `(S, B / itemsize)` of a pool: as numbers, int8 in 8 bits and bytes of two numbers each in 4; and as
    float16 scales, which follow the numbers of a record. None: there are no scales.
    """
    records, codec = pages.records, pages.codec
    if codec.bits == PLAIN:
        return records.view(codec.dtype), None
    if codec.bits not in (8, 4):
        raise NotImplementedError(f"no kernel reads pages of {codec.bits} bits")
    return records.view(torch.int8) if codec.bits == 8 else records, records.view(torch.float16)
