"""Kernels in Triton's interpreter, as a card may run them: programs in any order, and each tensor alone in memory.

Programs of a launch are run in a random order. Every tensor argument is a part of a larger buffer whose rest is
poisoned: what is written there is found after the launch, and what is read there is NaN, or far out of range.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

BORDER = 4096
"""Bytes before and after each tensor."""
POISON = 0xFF
"""NaN as float16, bfloat16 and float32, and -1 or the largest number as an integer."""


class Overrun(AssertionError):
    """A kernel wrote beside one of its tensors."""


class _Guarded:
    """A copy of a storage within poison, in which a launch works."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.original = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,), (1,))
        self.buffer = torch.full((size + 2 * BORDER,), POISON, dtype=torch.uint8)
        self.inside = self.buffer[BORDER : BORDER + size]
        self.inside.copy_(self.original)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        offset = BORDER // tensor.element_size() + tensor.storage_offset()
        return torch.empty(0, dtype=tensor.dtype).set_(
            self.buffer.untyped_storage(), offset, tensor.shape, tensor.stride()
        )

    def finish(self, kernel: str) -> None:
        """Copy back what the launch wrote. Raises `Overrun` if the poison is not what it was."""
        size = len(self.inside)
        outside = torch.cat((self.buffer[:BORDER], self.buffer[BORDER + size :]))
        if (written := (outside != POISON).nonzero()).numel():
            at = int(written[0])
            raise Overrun(
                f"{kernel} wrote {at - BORDER} bytes from the {'start' if at < BORDER else 'end'} of a tensor"
            )
        self.original.copy_(self.inside)


@contextmanager
def guarded(seed: int) -> Iterator[None]:
    """All launches in the block are guarded, and their programs shuffled by `seed`."""
    order = random.Random(seed)
    call = interpreter.GridExecutor.__call__

    def run(self: Any, *args: Any, **options: Any) -> None:
        guards: dict[int, _Guarded] = {}

        def within(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.numel() == 0:
                return value
            storage = value.untyped_storage()
            if storage.data_ptr() not in guards:
                guards[storage.data_ptr()] = _Guarded(storage)
            return guards[storage.data_ptr()].of(value)

        inside = [within(value) for value in args]
        name, grid = self.fn.__name__, (*self.grid, 1, 1)[:3]
        places = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        order.shuffle(places)
        ids = iter(places)
        builder = interpreter.interpreter_builder
        place = builder.set_grid_idx
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder, "set_grid_idx", lambda *_: place(*next(ids)))
            call(self, *inside, **options)
        for guard in guards.values():
            guard.finish(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", run)
        yield
