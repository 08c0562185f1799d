"""TieredLayer: one layer of a TieredCache, in transformers' protocol: its host tier, and its share of the device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from tieredkv.attention import interface
from tieredkv.cache import prefill
from tieredkv.cache.context_digests import ContextDigests
from tieredkv.cache.sealed_layer import SealedLayer, Tiers
from tieredkv.environment.ambient import attended_dtype, settled
from tieredkv.errors import OptionError, UnsupportedModelError
from tieredkv.memory.host import HostLayer
from tieredkv.memory.ledger import on_device
from tieredkv.planning import sizes

if TYPE_CHECKING:
    from tieredkv.cache.tiered_cache import TieredCache


class TieredLayer(CacheLayerMixin):
    """One layer: its host tier, what the last text rows said of it, and, once sealed, its share of the pool."""

    is_sliding = False
    sliding_window = None
    is_compileable = False
    is_croppable = True

    def __init__(self, cache: TieredCache, index: int) -> None:
        super().__init__()
        self.cache: TieredCache = weakref.proxy(cache)  # or the host tier would outlive its last user
        self.index = index
        self.host: HostLayer | None = None
        self.resident: prefill.Resident | None = None
        self.rows: prefill.TextRows | None = None
        self.sealed: SealedLayer | None = None
        self.digests: ContextDigests | None = None
        self._check: Callable[[], None] | None = None

    # ---- transformers' protocol

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._begin(key_states, value_states, attended_dtype(key_states))

    @settled
    def _begin(self, key_states: torch.Tensor, value_states: torch.Tensor, dtype: torch.dtype) -> None:
        self.dtype, self.device = dtype, key_states.device
        self.cache.place(self.device)
        _, heads, _, head_dim = key_states.shape
        if value_states.shape != key_states.shape:
            raise UnsupportedModelError("keys and values of different shapes are not supported.")
        self.host = HostLayer(heads, head_dim, self.cache.tiers.chunk_tokens, self.dtype, self.cache.locker)
        self.host.reserve(self.cache.prompt_tokens)
        self.digests = ContextDigests(self.cache, self.host, self.device)
        self.is_initialized = True
        if keep := self.cache.resident_tokens():
            shape = (heads, keep, head_dim)
            self.resident = prefill.Resident(
                self.cache.ledger.empty("resident", shape, self.dtype, self.device),
                self.cache.ledger.empty("resident", shape, self.dtype, self.device),
            )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if key_states.shape[0] != 1:
            raise OptionError(
                f"TieredCache holds one sequence, got a batch of {key_states.shape[0]}: run them one at a time."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cache.announce(self.index, key_states.shape[-2])
        return interface.tag(key_states, self), value_states

    def get_seq_length(self) -> int:
        """Logical length: every token cached, wherever it is now."""
        if self.sealed is not None:
            return self.sealed.length
        return self.prompt_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        raise OptionError("TieredCache cannot be reset: make a new one, or crop it.")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise OptionError("TieredCache does not support beam search: use num_beams=1.")

    # ---- attention

    @settled
    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        """Cache new tokens and attend to them and all before. query `(H, n, D)`, keys and values `(K, n, D)`.

        Keys and values stay of the dtype of the first; the output is of the query's.
        """
        self.cache.check_turn(self.index)
        self._check_once()
        with on_device(self.device):
            attend = self._prefill if self.sealed is None else self.sealed.steps
            out = attend(query.to(self.dtype), keys.to(self.dtype), values.to(self.dtype), scaling)
        self.cache.attended()
        return out.to(query.dtype)

    def _check_once(self) -> None:
        if self._check is not None:
            self._check()
            self._check = None

    def _prefill(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        assert self.host is not None
        assert self.digests is not None
        cache, host, n = self.cache, self.host, query.shape[1]
        self.digests.before_prompt()
        rows = min(n, cache.text_rows)
        if host.length + n > host.capacity:
            cache.copies.drain()  # what is held moves
            host.make_room(n)
        cache.make_room_for_scores(host.length, n, rows)
        with prefill.staged_past(
            host,
            self.resident,
            n,
            rows,
            cache.shape,
            cache.tiers,
            cache.ledger,
            cache.transfer,
            cache.copies,
            query.device,
            cache.new_tokens,
        ) as past:
            past.run_ahead()
            # Written back meanwhile, behind the tokens that are read.
            kept = keys.detach(), values.detach()
            cache.copies.submit("write back", lambda: host.write(*kept))
            out, lse = prefill.attend_exactly(query, keys, values, scaling, past)
            self.rows = None  # those of an earlier call say nothing of this one
            if rows:
                self.rows = prefill.score_text_rows(
                    query[:, -rows:], lse[:, -rows:], keys, scaling, past, cache.tiers, cache.looks
                )
            cache.copies.wait("write back")
        if self.resident is not None:
            self.resident.append(keys.detach(), values.detach(), host.length)
        self.digests.observe(query)
        host.advance(n)
        self.digests.update()
        return out

    # ---- tiers

    @property
    def prompt_length(self) -> int:
        """Tokens in the host tier: all but those generated since the last seal."""
        return 0 if self.host is None else self.host.length

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write tokens `(K, n, D)` to the host tier and digest the chunks they complete."""
        assert self.host is not None
        assert self.digests is not None
        self.host.append(keys, values)
        self.digests.update()

    def settle(self) -> None:
        """What is cached is the context of all that follows: digests are fitted to it and to nothing else."""
        if self.digests is not None:
            self.digests.settle()

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens. Not while sealed."""
        if self.host is None or tokens >= self.host.length:
            return
        self.host.truncate(tokens)
        if self.resident is not None:
            self.resident.length = min(self.resident.length, tokens)
        assert self.digests is not None
        self.digests.truncate(tokens)
        self.rows = None

    @settled
    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` needs, contiguous, in host memory. Not while sealed."""
        assert self.host is not None
        assert self.digests is not None
        self._check_once()  # or damage would be given a checksum that fits it
        digests = self.digests.state()
        self.cache.copies.drain()
        return {"kv": self.host.whole(sizes.QUESTION_ROOM), **digests}

    @settled
    def restore(
        self, state: dict[str, torch.Tensor], tokens: int, device: torch.device, check: Callable[[], None]
    ) -> None:
        """Take the state of `tokens` tokens. device: of the model's layer. check: called before they are first attended
        to; raises if damaged."""
        arena = state["kv"]
        self.dtype, self.device = arena.dtype, device
        self.cache.place(device)
        heads, _, _, c, head_dim = arena.shape
        self.host = HostLayer(heads, head_dim, c, self.dtype, self.cache.locker)
        self.host.adopt(arena, tokens)
        self.digests = ContextDigests(self.cache, self.host, self.device)
        self.digests.restore(state)
        self._check = check
        self.is_initialized = True

    def close(self) -> None:
        """Free the layer's memory."""
        self.rows = self.digests = self.resident = self._check = None
        if self.host is not None:
            self.host.close()

    def seal(self, static: torch.Tensor, is_text: torch.Tensor, tiers: Tiers) -> None:
        """Enter the decode phase. static: `(K,)`."""
        assert self.host is not None
        assert self.rows is not None
        assert self.digests is not None
        self.digests.update(fit=True)
        packed, fitted = self.digests.packed, self.digests.fitted
        self.sealed = SealedLayer(self.index, self.host, packed, fitted, static, self.rows, is_text, tiers)

    def unseal(self) -> None:
        """Back to prefill: the tokens generated since the seal join the host tier."""
        if self.sealed is None:
            return
        keys, values = self.sealed.generated_tokens()
        self.sealed = self.rows = None
        if keys.shape[1]:
            self.append(keys, values)
