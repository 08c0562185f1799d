"""Page-locked host memory, which a card reads directly: allocated memory is registered once, in the background.

torch's own page-locked allocator rounds every block up to a power of two; registering does not.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from tieredkv.memory.capturing import CAPTURE
from tieredkv.memory.units import ceil_div

PAGE_BYTES = 4096
_PORTABLE = 1
"""cudaHostRegisterPortable: all cards may read it."""


def aligned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised host tensor that begins on a page and shares no page with other data."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    whole = ceil_div(nbytes, PAGE_BYTES) * PAGE_BYTES
    memory = torch.empty(whole + PAGE_BYTES, dtype=torch.uint8, device="cpu")
    begin = -memory.data_ptr() % PAGE_BYTES
    return memory[begin : begin + nbytes].view(dtype).view(shape)


class PageLocker:
    """Registers tensors with the CUDA driver on a thread, as it is reported to take 0.5 to 1 s per GiB."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._cards: list[torch.device] = []
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tieredkv-pagelock")
        self._locks: dict[int, tuple[torch.Tensor, Future[None]]] = {}
        """By address. Keeps registered memory alive: a card would read whatever was allocated there next."""

    def use(self, card: torch.device) -> None:
        """Add a card that reads the memory: `unlock` waits until it is idle."""
        self._cards.append(card)

    def lock(self, tensor: torch.Tensor) -> None:
        """Start registering a tensor's memory, which must not move or be freed until `unlock`."""
        if tensor.numel():
            address, nbytes = tensor.data_ptr(), ceil_div(tensor.nbytes, PAGE_BYTES) * PAGE_BYTES
            self._locks[address] = tensor, self._executor.submit(self._register, address, nbytes)

    def _register(self, address: int, nbytes: int) -> None:
        with torch.cuda.device(self._cards[0]):
            _check(torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE), "cudaHostRegister")

    def refusal(self) -> str | None:
        """Wait for all registrations. Returns the error of one that failed, or None."""
        for _, future in self._locks.values():
            if error := future.exception():
                return str(error)
        return None

    def unlock(self, tensor: torch.Tensor) -> None:
        """Undo `lock` once the cards are idle. Does nothing if it failed or was not called, or in a forked process.

        Waits for captures of other sessions. If CUDA refuses, the memory stays registered and alive.
        """
        if self._process != os.getpid():
            return
        self._unlock(tensor.data_ptr())

    def _unlock(self, address: int) -> None:
        _, future = self._locks.get(address, (None, None))
        if future is not None and future.exception() is None:
            with CAPTURE:
                for card in self._cards:
                    torch.cuda.synchronize(card)
                with torch.cuda.device(self._cards[0]):
                    _check(torch.cuda.cudart().cudaHostUnregister(address), "cudaHostUnregister")
        self._locks.pop(address, None)

    def close(self) -> None:
        """Unlock everything and end the thread. May be called twice; does nothing in a forked process."""
        if self._process != os.getpid():
            return
        for address in list(self._locks):
            self._unlock(address)
        self._executor.shutdown(wait=True)


def _check(result: object, what: str) -> None:
    code = int(result)  # type: ignore[call-overload]
    if code:
        raise RuntimeError(f"{what} failed with CUDA error {code}")
