"""Host tier: the complete keys and values of the prompt, head-major in chunks. One `HostLayer` per model layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tieredkv.memory.limits import check_host_memory
from tieredkv.memory.pagelock import PageLocker, aligned

GROWTH_TOKENS = 256
"""Least room, in tokens, by which a layer grows beyond what it must hold."""


class HostLayer:
    """All cached tokens of one layer: `(K, chunks, 2, C, D)`, keys at index 0 and values at 1 of the third axis."""

    def __init__(
        self, num_heads: int, head_dim: int, chunk_tokens: int, dtype: torch.dtype, locker: PageLocker | None = None
    ) -> None:
        """locker: keeps the memory page-locked, for a card to read."""
        self.num_heads, self.head_dim, self.chunk_tokens, self.dtype = (
            num_heads,
            head_dim,
            chunk_tokens,
            dtype,
        )
        self.length = 0
        self._locker = locker
        self._arena = torch.empty((num_heads, 0, 2, chunk_tokens, head_dim), dtype=dtype, device="cpu")

    @property
    def arena(self) -> torch.Tensor:
        """All the memory `(K, chunks, 2, C, D)`; what lies beyond `length` is undefined."""
        return self._arena

    @property
    def nbytes(self) -> int:
        return self._arena.numel() * self._arena.itemsize

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return self._arena.shape[1] * self.chunk_tokens

    def bytes_for(self, tokens: int) -> int:
        """Bytes that hold `tokens` tokens, in whole chunks."""
        chunks = -(-tokens // self.chunk_tokens)
        return self.num_heads * chunks * 2 * self.chunk_tokens * self.head_dim * self.dtype.itemsize

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all; what is held stays. Never shrinks."""
        chunks = -(-tokens // self.chunk_tokens)
        held = self._arena.shape[1]
        if chunks <= held:
            return
        what = f"one layer's host cache of {tokens:,} tokens"
        check_host_memory(self.bytes_for(tokens), what, "shorten the prompt or the video")
        shape = (self.num_heads, chunks, 2, self.chunk_tokens, self.head_dim)
        grown = self._empty(shape)
        used = -(-self.length // self.chunk_tokens)
        grown[:, :used] = self._arena[:, :used]
        self._replace(grown)

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        if self._locker is not None:
            return aligned(shape, self.dtype)
        return torch.empty(shape, dtype=self.dtype, device="cpu")

    def _replace(self, arena: torch.Tensor) -> None:
        if self._locker is not None:
            self._locker.unlock(self._arena)
            self._locker.lock(arena)
        self._arena = arena

    def make_room(self, tokens: int) -> None:
        """Grow, by an eighth or more, if `tokens` more do not fit."""
        if self.length + tokens > self.capacity:
            self.reserve(self.length + tokens + max(GROWTH_TOKENS, self.length // 8))

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> int:
        """Write keys and values, each `(K, n, D)`, after those held, where there is room; `advance` counts them.

        Returns the bytes written. May run on another thread while chunks of what is held are read. What comes from a
        card may arrive later, in the order of the current stream.
        """
        n, done = keys.shape[1], 0
        while done < n:
            chunk, offset = divmod(self.length + done, self.chunk_tokens)
            if offset == 0 and n - done >= self.chunk_tokens:
                whole = (n - done) // self.chunk_tokens
                take = whole * self.chunk_tokens
                shape = (self.num_heads, whole, self.chunk_tokens, self.head_dim)
                parts = [part[:, done : done + take].reshape(shape) for part in (keys, values)]
                to = self._arena[:, chunk : chunk + whole]
                if keys.device.type == "cpu":
                    to[:, :, 0], to[:, :, 1] = parts
                else:  # one contiguous copy per head
                    for place, packed in zip(to, torch.stack(parts, dim=2), strict=True):
                        place.copy_(packed, non_blocking=True)
            else:
                take = min(self.chunk_tokens - offset, n - done)
                self._arena[:, chunk, 0, offset : offset + take] = keys[:, done : done + take]
                self._arena[:, chunk, 1, offset : offset + take] = values[:, done : done + take]
            done += take
        return 2 * keys.numel() * keys.itemsize

    def advance(self, tokens: int) -> None:
        """Count `tokens` more tokens, which have been written."""
        if self.length + tokens > self.capacity:
            raise ValueError(f"{self.length + tokens} tokens do not fit {self.capacity}")
        self.length += tokens

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the next tokens' keys and values, each `(K, n, D)`, growing if need be."""
        self.make_room(keys.shape[1])
        self.write(keys, values)
        self.advance(keys.shape[1])

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens; their memory is kept for what comes next."""
        if not 0 <= tokens <= self.length:
            raise ValueError(f"cannot keep {tokens} of {self.length} tokens")
        self.length = tokens

    def chunks(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """View `(K, n, 2, C, D)` of chunks start..stop (default: all begun ones; the last may be partly filled)."""
        begun = -(-self.length // self.chunk_tokens)
        return self._arena[:, start : begun if stop is None else stop]

    def blocks(self, first: int, tokens: int, block_tokens: int) -> Iterator[tuple[int, int]]:
        """Ranges of chunks that cover tokens `first` (whole chunks) to `tokens`, each of at most `block_tokens`."""
        step = max(1, block_tokens // self.chunk_tokens)
        last = -(-tokens // self.chunk_tokens)
        for start in range(first // self.chunk_tokens, last, step):
            yield start, min(start + step, last)

    def tokens(self, head: int, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each `(n, D)`, of single tokens of one head. index: `(n,)` int64."""
        chunk, offset = index // self.chunk_tokens, index % self.chunk_tokens
        return self._arena[head, chunk, 0, offset], self._arena[head, chunk, 1, offset]

    def whole(self, room: int) -> torch.Tensor:
        """All the memory `(K, chunks, 2, C, D)`, contiguous, to be stored; what lies beyond the length is zeroed.

        Gives back first what is more than `room` tokens beyond the length.
        """
        chunks = -(-(self.length + room) // self.chunk_tokens)
        if chunks < self._arena.shape[1]:
            shape = (self.num_heads, chunks, *self._arena.shape[2:])
            self._replace(self._empty(shape).copy_(self._arena[:, :chunks]))
        last, offset = divmod(self.length, self.chunk_tokens)
        if offset:
            self._arena[:, last, :, offset:] = 0
        self._arena[:, -(-self.length // self.chunk_tokens) :] = 0
        return self._arena

    def adopt(self, arena: torch.Tensor, length: int) -> None:
        """Hold `length` tokens in memory that `whole` gave once, and write behind them."""
        heads, _, two, c, d = arena.shape
        if (heads, two, c, d) != (self.num_heads, 2, self.chunk_tokens, self.head_dim) or arena.dtype != self.dtype:
            raise ValueError(f"an arena of shape {tuple(arena.shape)} and {arena.dtype} is not this layer's")
        self.length = 0
        self._replace(arena if self._locker is None else self._empty(arena.shape).copy_(arena))
        self.advance(length)

    def close(self) -> None:
        """Free the memory. The layer is empty afterwards."""
        self._replace(self._arena.new_empty((self.num_heads, 0, 2, self.chunk_tokens, self.head_dim)))
        self.length = 0
