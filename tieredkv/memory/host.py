"""Host tier: the complete keys and values of the prompt, as records of a codec. One `HostLayer` per model layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from tieredkv.codecs import PLAIN, codec_for
from tieredkv.codecs.base import AT_ONCE, FIT_TOKENS, Codec, Fit, tokens_of
from tieredkv.memory.arena import Arena, MemoryArena
from tieredkv.memory.units import ceil_div

GROWTH_TOKENS = 256
"""Least number of spare tokens to add when a layer grows."""


class HostLayer:
    """All cached tokens of one layer, in records `(K, chunks, B)`: as the model made them at first, and from `pack` on
    in fewer bits. An `ops.base.Source`.

    Shapes: `K` KV heads, `n` tokens, `m` chunks, `C` chunk tokens, `B` bytes of a record, `w` of a field, `D` head dim.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        chunk_tokens: int,
        dtype: torch.dtype,
        new_arena: Callable[[int, int], Arena] = MemoryArena,
    ) -> None:
        """dtype: the model's. new_arena: called with `K` and `B` for an empty arena."""
        self.num_heads, self.head_dim = num_heads, head_dim
        self.chunk_tokens, self.dtype = chunk_tokens, dtype
        self.length = 0
        self.codec: Codec = codec_for(PLAIN, chunk_tokens, head_dim, dtype)
        self.fit: Fit | None = None
        """What the codec was fitted to; on the host."""
        self._new_arena = new_arena
        self._arena = new_arena(num_heads, self.codec.chunk_bytes)

    @property
    def arena(self) -> Arena:
        """Where the records are."""
        return self._arena

    @property
    def records(self) -> torch.Tensor | None:
        """All records, `(K, chunks, B)`; undefined beyond `length`. None: not in memory."""
        return self._arena.records

    def fit_on(self, device: torch.device) -> Fit | None:
        """`fit` on a device, for the current stream. Does not wait for what that is computing."""
        if self.fit is None:
            return None
        return Fit(*(part.to(device, non_blocking=True) for part in (self.fit.centre, self.fit.channels)))

    def fetch(self, heads: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
        """A copy `(m, B)` of the records `chunks[i]` of `heads[i]`, both `(m,)` on the host."""
        return self._arena.fetch(heads, chunks)

    @property
    def nbytes(self) -> int:
        """Host memory that it takes."""
        return self._arena.nbytes

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return self._arena.capacity * self.chunk_tokens

    def _chunks(self, tokens: int) -> int:
        return ceil_div(tokens, self.chunk_tokens)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all, keeping those stored. Never shrinks."""
        self._arena.reserve(self._chunks(tokens))

    def make_room(self, tokens: int) -> None:
        """Grow if `tokens` more do not fit, with spare room of at least an eighth of the length."""
        if self.length + tokens > self.capacity:
            self.reserve(self.length + tokens + max(GROWTH_TOKENS, self.length // 8))

    # ---- writing

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> int:
        """Write keys and values, each `(K, n, D)`, after the last token; the room must exist. Returns the bytes stored.

        They are encoded on their device. Call `advance` afterwards to count them. May run on another thread while
        earlier tokens are read. Copies from a card are asynchronous, in the order of the current stream.
        """
        fit, nbytes = self.fit_on(keys.device), 0
        for begin, stop in self._spans(keys):
            fields = self.codec.encode(keys[:, begin:stop], values[:, begin:stop], fit)
            nbytes += self._put(self.length + begin, fields)
        return nbytes

    def _spans(self, keys: torch.Tensor) -> Iterator[tuple[int, int]]:
        """Ranges of new tokens `(K, n, D)` to encode at a time; all but the last end with a chunk."""
        tokens, begin = keys.shape[1], 0
        if not self.codec.needs_fit:
            yield 0, tokens
            return
        at_once = self.codec.chunks_at_once(keys.device)
        while begin < tokens:
            chunk = (self.length + begin) // self.chunk_tokens
            stop = min(tokens, (chunk + at_once) * self.chunk_tokens - self.length)
            yield begin, stop
            begin = stop

    def _put(self, begin: int, fields: tuple[torch.Tensor, ...]) -> int:
        """Write encoded tokens `(K, n, w)` as tokens `begin` and on. Returns their bytes."""
        n, c, done = fields[0].shape[1], self.chunk_tokens, 0
        while done < n:
            chunk, offset = divmod(begin + done, c)
            if offset or n - done < c:
                take = min(c - offset, n - done)
                self._put_part(chunk, offset, [field[:, done : done + take] for field in fields])
            else:
                take = (n - done) // c * c
                self._put_chunks(chunk, [field[:, done : done + take].unflatten(1, (-1, c)) for field in fields])
            done += take
        return sum(field.nbytes for field in fields)

    def _put_part(self, chunk: int, offset: int, fields: list[torch.Tensor]) -> None:
        """Write tokens `(K, n, w)` of one chunk, from its token `offset` on."""
        n, in_memory = fields[0].shape[1], self.records is not None
        for all_heads, new in zip(self.codec.fields(self._arena.open(chunk)), fields, strict=True):
            own = all_heads[:, offset : offset + n]
            if new.device.type == "cpu":
                own.copy_(new)
                continue
            for each, head in zip(own, new.contiguous(), strict=True):  # a strided copy would block
                each.copy_(head, non_blocking=in_memory)

    def _put_chunks(self, first: int, fields: list[torch.Tensor]) -> None:
        """Write whole chunks, `(K, m, C, w)`, from chunk `first` on."""
        count, device, in_memory = fields[0].shape[1], fields[0].device, self.records
        if in_memory is not None and device.type == "cpu":
            records = in_memory[:, first : first + count]
        else:
            records = torch.empty((self.num_heads, count, self.codec.chunk_bytes), dtype=torch.uint8, device=device)
        for own, new in zip(self.codec.fields(records), fields, strict=True):
            own.copy_(new)
        if in_memory is None or device.type != "cpu":
            self._arena.write(first, records)

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

    # ---- reading

    def chunks(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Records `(K, m, B)` of chunks start..stop (None: to the last, which may be partly filled): a view where they
        are in memory."""
        return self._arena.read(start, self._chunks(self.length) if stop is None else stop)

    def blocks(self, first: int, tokens: int, block_tokens: int) -> Iterator[tuple[int, int]]:
        """Ranges of chunks that cover tokens first..tokens, at most `block_tokens` each; `first` starts a chunk."""
        step = max(1, block_tokens // self.chunk_tokens)
        last = self._chunks(tokens)
        for start in range(first // self.chunk_tokens, last, step):
            yield start, min(start + step, last)

    def stage(self, start: int, stop: int, target: torch.Tensor, with_values: bool) -> int:
        """Copy chunks start..stop into `target` `(K, m, B)` on any device. Returns the bytes copied.

        with_values=False: from memory to memory, copy only what keys are decoded from. A card always gets all, as one
        contiguous copy per head is faster. May run on another thread.
        """
        if with_values or target.device.type != "cpu" or self.records is None:
            self._arena.stage(start, stop, target)
            return target.nbytes
        parts = self.codec.fields(target)[::2], self.codec.fields(self.chunks(start, stop))[::2]
        for own, new in zip(*parts, strict=True):
            own.copy_(new)
        return sum(own.nbytes for own in parts[0])

    def keys_of(self, records: torch.Tensor) -> torch.Tensor:
        """Keys `(K, m, C, D)` of records `(K, m, B)`, in the model's dtype: a view if nothing has to be decoded."""
        if not self.codec.needs_fit:
            return self.codec.fields(records)[0]
        shape = *records.shape[:2], self.chunk_tokens, self.head_dim
        keys = torch.empty(shape, dtype=self.dtype, device=records.device)
        self.codec.decode_to(keys, None, records, self.fit_on(records.device))
        return keys

    def keys(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """`keys_of` chunks start..stop, as `chunks` takes them."""
        return self.keys_of(self.chunks(start, stop))

    def decoded(self, begin: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of keys and values, each `(K, n, D)` of the model's dtype, of tokens begin..stop."""
        records = self.chunks(begin // self.chunk_tokens, self._chunks(stop))
        shape = 2, *records.shape[:2], self.chunk_tokens, self.head_dim
        both = torch.empty(shape, dtype=self.dtype, device="cpu")
        self.codec.decode_to(both[0], both[1], records, self.fit)
        first = begin % self.chunk_tokens
        keys, values = both.flatten(2, 3)[:, :, first : first + stop - begin]
        return keys, values

    def tokens(self, head: int, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each `(n, D)` of the model's dtype, of tokens `index` `(n,)` int64 of one head."""
        chunk, offset = index // self.chunk_tokens, index % self.chunk_tokens
        if self.records is not None:
            records = self.records[head]
        else:
            needed, chunk = chunk.unique(return_inverse=True)
            records = self.fetch(torch.full_like(needed, head), needed)
        fields = tuple(field[chunk, offset].unsqueeze(0) for field in self.codec.fields(records))
        fit = None if self.fit is None else self.fit.of_heads(slice(head, head + 1))
        keys, values = self.codec.decode(fields, fit)
        return keys[0].to(self.dtype), values[0].to(self.dtype)

    # ---- as stored

    @property
    def token_bytes(self) -> int:
        """Of one token as `stored` returns it."""
        record = torch.empty((self.num_heads, self.codec.chunk_bytes), dtype=torch.uint8, device="cpu")
        return sum(field[:, 0].numel() * field.itemsize for field in self.codec.fields(record))

    def stored(self, begin: int, stop: int) -> tuple[torch.Tensor, ...]:
        """Copies `(K, n, w)` of what the codec has stored of tokens begin..stop."""
        first = begin % self.chunk_tokens
        records = self.chunks(begin // self.chunk_tokens, self._chunks(stop))
        fields = tokens_of(self.codec.fields(records))
        return tuple(field[:, first : first + stop - begin].clone() for field in fields)

    def append_stored(self, fields: tuple[torch.Tensor, ...]) -> None:
        """`append` for tokens as `stored` has returned them."""
        tokens = fields[0].shape[1]
        self.make_room(tokens)
        self._put(self.length, fields)
        self.advance(tokens)

    # ---- another codec

    def pack(self, codec: Codec, room: int = 0) -> None:
        """Store all tokens, at least one, by `codec` from now on, with room for `room` in all.

        Once, and not while copies are under way. The codec is fitted to the first `FIT_TOKENS` tokens, which are still
        as the model made them. The room that they took is freed at the end. If it fails, the layer is as it was.
        """
        if self.codec.needs_fit:
            raise ValueError(f"the layer is stored in {self.codec.bits} bits already")
        plain, tokens, before = self.codec, self.length, self._arena
        fit = codec.fit(*self.decoded(0, min(tokens, FIT_TOKENS)))
        packed = self._new_arena(self.num_heads, codec.chunk_bytes)
        try:
            packed.reserve(self._chunks(max(room, tokens)))
            self.codec, self.fit, self._arena, self.length = codec, fit, packed, 0
            for start, stop in self.blocks(0, tokens, AT_ONCE):
                fields = plain.fields(before.read(start, stop))
                keys, values = (part.flatten(1, 2)[:, : tokens - self.length] for part in fields)
                self.write(keys, values)
                self.advance(keys.shape[1])
        except BaseException:  # above all a full disk, or Ctrl-C
            self.codec, self.fit, self._arena, self.length = plain, None, before, tokens
            packed.close()
            raise
        before.close()

    def freeze(self) -> None:
        """Later tokens may be cut off again, those stored so far will not."""
        self._arena.freeze(self.length // self.chunk_tokens)

    def clear(self) -> None:
        """Forget all tokens and the codec, and free the memory: as a new layer."""
        self._arena.close()
        self.length, self.fit = 0, None
        self.codec = codec_for(PLAIN, self.chunk_tokens, self.head_dim, self.dtype)
        self._arena = self._new_arena(self.num_heads, self.codec.chunk_bytes)

    # ---- files

    def arena_to_store(self, room: int) -> torch.Tensor:
        """The contiguous records, zeroed after the last token and cut to `room` more tokens, in whole chunks."""
        self._arena.shrink(self._chunks(self.length + room))
        records = self._arena.whole()
        last, offset = divmod(self.length, self.chunk_tokens)
        if offset:
            for field in self.codec.fields(records[:, last]):
                field[:, offset:] = 0
        records[:, self._chunks(self.length) :] = 0
        return records

    def adopt(self, arena: Arena, length: int, codec: Codec, fit: Fit | None) -> None:
        """Replace the contents by `length` tokens in an arena of records of `codec`; new tokens follow them."""
        shape = self.num_heads, arena.capacity, codec.chunk_bytes
        if arena.records is not None and (given := tuple(arena.records.shape)) != shape:
            raise ValueError(f"records of shape {given} do not fit this layer")
        self._arena.close()
        self.codec, self.fit, self._arena, self.length = codec, fit, arena, 0
        self.advance(length)

    def close(self) -> None:
        """Free the memory. The layer is empty afterwards."""
        self._arena.close()
        self.length = 0
