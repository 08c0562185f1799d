"""Host tier: the complete keys and values of the prompt, head-major in chunks. One `HostLayer` per model layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tieredkv.memory.limits import check_host_memory
from tieredkv.memory.pagelock import PageLocker, aligned
from tieredkv.memory.units import ceil_div

GROWTH_TOKENS = 256
"""Least number of spare tokens to add when a layer grows."""


class HostLayer:
    """All cached tokens of one layer, `(K, chunks, 2, C, D)`: keys at index 0 of the third axis, values at 1."""

    def __init__(
        self, num_heads: int, head_dim: int, chunk_tokens: int, dtype: torch.dtype, locker: PageLocker | None = None
    ) -> None:
        """locker: keeps the memory page-locked, so that a card can read it."""
        self.num_heads, self.head_dim = num_heads, head_dim
        self.chunk_tokens, self.dtype = chunk_tokens, dtype
        self.length = 0
        self._locker = locker
        self._arena = torch.empty((num_heads, 0, 2, chunk_tokens, head_dim), dtype=dtype, device="cpu")

    @property
    def arena(self) -> torch.Tensor:
        """All memory of the layer, `(K, chunks, 2, C, D)`; undefined beyond `length`."""
        return self._arena

    @property
    def nbytes(self) -> int:
        return self._arena.numel() * self._arena.itemsize

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return self._arena.shape[1] * self.chunk_tokens

    def _chunks(self, tokens: int) -> int:
        return ceil_div(tokens, self.chunk_tokens)

    def bytes_for(self, tokens: int) -> int:
        """Bytes for `tokens` tokens, in whole chunks."""
        elements = self.num_heads * self._chunks(tokens) * 2 * self.chunk_tokens * self.head_dim
        return elements * self.dtype.itemsize

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all, keeping those stored. Never shrinks."""
        chunks = self._chunks(tokens)
        if chunks <= self._arena.shape[1]:
            return
        what = f"one layer's host cache of {tokens:,} tokens"
        check_host_memory(self.bytes_for(tokens), what, "shorten the prompt or the video")
        shape = (self.num_heads, chunks, 2, self.chunk_tokens, self.head_dim)
        grown = self._empty(shape)
        used = self._chunks(self.length)
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
        """Grow if `tokens` more do not fit, with spare room of at least an eighth of the length."""
        if self.length + tokens > self.capacity:
            self.reserve(self.length + tokens + max(GROWTH_TOKENS, self.length // 8))

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> int:
        """Write keys and values, each `(K, n, D)`, after the last token; the room must exist. Returns their bytes.

        Call `advance` afterwards to count them. May run on another thread while earlier tokens are read. Copies from a
        card are asynchronous, in the order of the current stream.
        """
        n, done = keys.shape[1], 0
        while done < n:
            chunk, offset = divmod(self.length + done, self.chunk_tokens)
            if offset == 0 and n - done >= self.chunk_tokens:
                whole = (n - done) // self.chunk_tokens
                take = whole * self.chunk_tokens
                shape = (self.num_heads, whole, self.chunk_tokens, self.head_dim)
                parts = [part[:, done : done + take].reshape(shape) for part in (keys, values)]
                target = self._arena[:, chunk : chunk + whole]
                if keys.device.type == "cpu":
                    target[:, :, 0], target[:, :, 1] = parts
                else:  # one contiguous copy per head
                    for head, source in zip(target, torch.stack(parts, dim=2), strict=True):
                        head.copy_(source, non_blocking=True)
            else:
                take = min(self.chunk_tokens - offset, n - done)
                self._arena[:, chunk, 0, offset : offset + take] = keys[:, done : done + take]
                self._arena[:, chunk, 1, offset : offset + take] = values[:, done : done + take]
            done += take
        return 2 * keys.numel() * keys.itemsize

    def advance(self, tokens: int) -> None:
        """Count `tokens` tokens that `write` has written."""
        if self.length + tokens > self.capacity:
            raise ValueError(f"{self.length + tokens} tokens exceed the capacity of {self.capacity}")
        self.length += tokens

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the next tokens' keys and values, each `(K, n, D)`, growing if necessary."""
        self.make_room(keys.shape[1])
        self.write(keys, values)
        self.advance(keys.shape[1])

    def truncate(self, tokens: int) -> None:
        """Keep only the first `tokens` tokens; the memory of the others is kept for later ones."""
        if not 0 <= tokens <= self.length:
            raise ValueError(f"cannot keep {tokens} of {self.length} tokens")
        self.length = tokens

    def chunks(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """View `(K, n, 2, C, D)` of chunks start..stop (None: to the last, which may be partly filled)."""
        return self._arena[:, start : self._chunks(self.length) if stop is None else stop]

    def blocks(self, first: int, tokens: int, block_tokens: int) -> Iterator[tuple[int, int]]:
        """Ranges of chunks that cover tokens first..tokens, at most `block_tokens` each; `first` starts a chunk."""
        step = max(1, block_tokens // self.chunk_tokens)
        last = self._chunks(tokens)
        for start in range(first // self.chunk_tokens, last, step):
            yield start, min(start + step, last)

    def tokens(self, head: int, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each `(n, D)`, of tokens `index` `(n,)` int64 of one head."""
        chunk, offset = index // self.chunk_tokens, index % self.chunk_tokens
        return self._arena[head, chunk, 0, offset], self._arena[head, chunk, 1, offset]

    def copied(self, begin: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of keys and values, each `(K, n, D)`, of tokens begin..stop."""
        first = begin % self.chunk_tokens
        part = self.chunks(begin // self.chunk_tokens, self._chunks(stop))
        keys, values = part.transpose(1, 2).reshape(self.num_heads, 2, -1, self.head_dim).unbind(1)
        return keys[:, first : first + stop - begin].clone(), values[:, first : first + stop - begin].clone()

    def arena_to_store(self, room: int) -> torch.Tensor:
        """The contiguous arena, zeroed after the last token and cut to `room` more tokens, in whole chunks."""
        chunks = self._chunks(self.length + room)
        if chunks < self._arena.shape[1]:
            shape = (self.num_heads, chunks, *self._arena.shape[2:])
            self._replace(self._empty(shape).copy_(self._arena[:, :chunks]))
        last, offset = divmod(self.length, self.chunk_tokens)
        if offset:
            self._arena[:, last, :, offset:] = 0
        self._arena[:, self._chunks(self.length) :] = 0
        return self._arena

    def adopt(self, arena: torch.Tensor, length: int) -> None:
        """Replace the contents by `length` tokens in an arena from `arena_to_store`; new tokens follow them."""
        heads, _, two, c, d = arena.shape
        if (heads, two, c, d) != (self.num_heads, 2, self.chunk_tokens, self.head_dim) or arena.dtype != self.dtype:
            raise ValueError(f"an arena of shape {tuple(arena.shape)} and {arena.dtype} does not fit this layer")
        self.length = 0
        self._replace(arena if self._locker is None else self._empty(arena.shape).copy_(arena))
        self.advance(length)

    def close(self) -> None:
        """Free the memory. The layer is empty afterwards."""
        self._replace(self._arena.new_empty((self.num_heads, 0, 2, self.chunk_tokens, self.head_dim)))
        self.length = 0
