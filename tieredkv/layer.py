"""TieredLayer: one layer of a TieredCache, in transformers' protocol: its host tier, and its share of the device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from tieredkv import prefill, sizes
from tieredkv.attention import interface
from tieredkv.errors import OptionError, UnsupportedModelError
from tieredkv.memory.host import HostLayer
from tieredkv.ops import ops_for
from tieredkv.policy import digest, sketch
from tieredkv.policy.base import Policy
from tieredkv.sealed import SealedLayer, Tiers

if TYPE_CHECKING:
    from tieredkv.cache import TieredCache


DIGEST_CHUNKS = 1024
"""Chunks digested at a time."""
FIT_TOKENS = 4096
"""Tokens that a basis is fitted to: the first of the prompt."""


def _digest_name(method: Policy) -> str:
    """What a saved file calls digests of this kind."""
    return f"digests.{method.digest}.{method.digest_bits}"


class TieredLayer(CacheLayerMixin):
    """One layer: its host tier, what the last text rows said of it, and, once sealed, its share of the pool."""

    is_sliding = False
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
        self._digests: torch.Tensor | None = None
        self._digest_name = ""
        self._digested = 0
        self._basis: sketch.Basis | None = None
        self._query_moment = torch.zeros(0)
        """`(K, D, D)`: sum of q q^T over the context's first rows, to fit a basis to."""
        self._fitted_to = 0
        self._settled = False
        self._check: Callable[[], None] | None = None

    # ---- transformers' protocol

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.cache.place(self.device)
        _, heads, _, head_dim = key_states.shape
        if value_states.shape != key_states.shape:
            raise UnsupportedModelError("keys and values of different shapes are not supported.")
        self.host = HostLayer(heads, head_dim, self.cache.tiers.chunk_tokens, self.dtype, self.cache.locker)
        self.host.reserve(self.cache.prompt_tokens)
        self._query_moment = torch.zeros(heads, head_dim, head_dim)
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

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        """Cache new tokens and attend to them and all before. query `(H, n, D)`, keys and values `(K, n, D)`."""
        self.cache.check_turn(self.index)
        self._check_once()
        with self.cache.on_device():
            attend = self._prefill if self.sealed is None else self.sealed.steps
            out = attend(query, keys, values, scaling)
        self.cache.attended()
        return out

    def _check_once(self) -> None:
        if self._check is not None:
            self._check()
            self._check = None

    def _prefill(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        assert self.host is not None
        cache, host, n = self.cache, self.host, query.shape[1]
        if self._settled:  # after a change of the policy, say: fitted to the context, before the question is among it
            self._digest_new_chunks(fit=True)
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
                self.rows = prefill.score_text_rows(query[:, -rows:], lse[:, -rows:], keys, scaling, past, cache.tiers)
            cache.copies.wait("write back")
        if self.resident is not None:
            self.resident.append(keys.detach(), values.detach(), host.length)
        begun = host.length
        host.advance(n)
        if not self._settled and begun < FIT_TOKENS:
            grouped = query.detach().reshape(host.num_heads, -1, query.shape[-1]).float()
            self._query_moment = self._query_moment + (grouped.transpose(1, 2) @ grouped).cpu()
        self._digest_new_chunks()
        return out

    # ---- tiers

    @property
    def prompt_length(self) -> int:
        """Tokens in the host tier: all but those generated since the last seal."""
        return 0 if self.host is None else self.host.length

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write tokens `(K, n, D)` to the host tier and digest the chunks they complete."""
        assert self.host is not None
        self.host.append(keys, values)
        self._digest_new_chunks()

    def _digest_new_chunks(self, fit: bool = False) -> None:
        """Digests of the kind that the policy asks for, of every whole chunk that has none.

        Those that need a basis wait for `FIT_TOKENS` tokens to fit it to; fit: fit it to what there is. One that was
        fitted to less, in a context that is not settled, is fitted again when the context has doubled.
        """
        assert self.host is not None
        method, c = self.cache.tiers.method, self.host.chunk_tokens
        kind, bits, name = digest.DIGESTS[method.digest], method.digest_bits, _digest_name(method)
        if self._digest_name != name:
            self._digests, self._digested, self._basis, self._digest_name = None, 0, None, name
        whole, most = self.host.length // c, max(1, FIT_TOKENS // c)
        outgrown = not self._settled and self._fitted_to < most and whole >= 2 * self._fitted_to
        if kind.fitted and self._basis is not None and outgrown:
            self._digests, self._digested, self._basis = None, 0, None
        if kind.fitted and self._basis is None:
            if whole == 0 or (self.host.length < FIT_TOKENS and not fit):
                return
            self._fitted_to = min(whole, most)
            self.cache.copies.drain()  # the host reads what was written back
            keys = self.host.chunks(0, self._fitted_to)[:, :, 0].flatten(1, 2)
            self._basis = sketch.fit(self._query_moment, keys, bits)
        held = [] if self._digests is None else [self._digests[:, : self._digested]]
        basis = None if self._basis is None else self._basis.to(self.device)
        at_once = self._chunks_to_digest(whole - self._digested)
        new = [
            self._digest(kind, bits, basis, first, min(first + at_once, whole))
            for first in range(self._digested, whole, at_once)
        ]
        if new:
            self._digests = torch.cat([*held, *new], dim=1)
            self._digested = whole

    def _chunks_to_digest(self, most: int) -> int:
        """At a time: on a card, as many as the cap leaves room for."""
        room = DIGEST_CHUNKS if self.device.type == "cpu" else self.cache.ledger.free_bytes // self._digesting_bytes(1)
        return max(1, min(DIGEST_CHUNKS, most, room))

    def _digesting_bytes(self, chunks: int) -> int:
        """Device bytes of digesting chunks: what is staged, three copies in float32."""
        assert self.host is not None
        tokens = chunks * self.host.num_heads * self.host.chunk_tokens
        return tokens * self.host.head_dim * (2 * self.dtype.itemsize + 3 * sizes.FLOAT32)

    def _digest(
        self, kind: digest.Digest, bits: int, basis: sketch.Basis | None, first: int, stop: int
    ) -> torch.Tensor:
        """Digests of chunks, on the host; made on the device."""
        assert self.host is not None
        chunks = self.host.chunks(first, stop)
        if self.device.type == "cpu":
            return kind.make(chunks[:, :, 0], bits, basis)
        with self.cache.ledger.scratch("digesting", self._digesting_bytes(stop - first)):
            staged = torch.empty(chunks.shape, dtype=self.dtype, device=self.device)
            self.cache.transfer.stage(chunks, staged, with_values=True)
            make = ops_for(self.device).pack_sketches if kind.fitted else kind.make
            return make(staged[:, :, 0], bits, basis).cpu()

    def settle(self) -> None:
        """What is cached is the context of all that follows: digests are fitted to it and to nothing else."""
        if self.host is not None:
            self._digest_new_chunks(fit=True)
            self._settled = True

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens. Not while sealed."""
        if self.host is None or tokens >= self.host.length:
            return
        self.host.truncate(tokens)
        if self.resident is not None:
            self.resident.length = min(self.resident.length, tokens)
        self._digested = min(self._digested, tokens // self.host.chunk_tokens)
        if tokens == 0:
            self._basis, self._settled = None, False
            self._query_moment = torch.zeros_like(self._query_moment)
        self.rows = None

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` needs, contiguous, in host memory. Not while sealed."""
        assert self.host is not None
        self._check_once()  # or damage would be given a checksum that fits it
        self.settle()
        self.cache.copies.drain()
        tensors = {"kv": self.host.whole(sizes.QUESTION_ROOM), "query_moment": self._query_moment}
        if self._digests is not None:
            tensors[self._digest_name] = self._digests[:, : self._digested].contiguous()
        if self._basis is not None:
            for part in ("down", "up", "centre"):
                tensors[f"{self._digest_name}.{part}"] = getattr(self._basis, part)
        return tensors

    def restore(self, state: dict[str, torch.Tensor], tokens: int, check: Callable[[], None]) -> None:
        """Take the state of `tokens` tokens. check: called before they are first attended to; raises if damaged."""
        arena = state["kv"]
        assert self.cache.device is not None
        self.dtype, self.device = arena.dtype, self.cache.device
        heads, _, _, c, head_dim = arena.shape
        self.host = HostLayer(heads, head_dim, c, self.dtype, self.cache.locker)
        self.host.adopt(arena, tokens)
        self._digest_name = _digest_name(self.cache.tiers.method)
        self._digests = state.get(self._digest_name)  # of another kind: made anew before it is used
        self._digested = 0 if self._digests is None else self._digests.shape[1]
        self._query_moment, self._settled = state["query_moment"], True
        if f"{self._digest_name}.up" in state:
            self._basis = sketch.Basis(*(state[f"{self._digest_name}.{part}"] for part in ("down", "up", "centre")))
        self._check = check
        self.is_initialized = True

    def close(self) -> None:
        """Free the layer's memory."""
        self.rows = self._digests = self.resident = self._check = None
        if self.host is not None:
            self.host.close()

    def seal(self, static: torch.Tensor, is_text: torch.Tensor, tiers: Tiers) -> None:
        """Enter the decode phase. static: `(K,)`."""
        assert self.host is not None
        assert self.rows is not None
        self._digest_new_chunks(fit=True)
        digests = torch.empty((self.host.num_heads, 0, 0), dtype=torch.uint8)
        digests = digests if self._digests is None else self._digests
        self.sealed = SealedLayer(self.index, self.host, digests, self._basis, static, self.rows, is_text, tiers)

    def unseal(self) -> None:
        """Back to prefill: the tokens generated since the seal join the host tier."""
        if self.sealed is None:
            return
        keys, values = self.sealed.generated_tokens()
        self.sealed = self.rows = None
        if keys.shape[1]:
            self.append(keys, values)
