"""TieredLayer: one layer of a TieredCache, in transformers' protocol."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from transformers.cache_utils import CacheLayerMixin

from tieredkv.attention import interface
from tieredkv.cache import prefill
from tieredkv.cache.context_digests import ContextDigests
from tieredkv.cache.correcting import Correcting
from tieredkv.cache.decode_phase import DecodePhase
from tieredkv.cache.device_tier import DeviceTier
from tieredkv.cache.layer_order import LayerOrder
from tieredkv.cache.question import Question
from tieredkv.cache.sealed_layer import SealedLayer
from tieredkv.codecs import PLAIN
from tieredkv.codecs.base import Codec, fit_of, fit_state
from tieredkv.environment.ambient import attended_dtype, settled
from tieredkv.errors import OptionError, UnsupportedModelError
from tieredkv.memory.host import HostLayer
from tieredkv.memory.ledger import on_device
from tieredkv.planning import sizes


class CacheOfLayers(Protocol):
    """What a layer needs of the cache that it belongs to."""

    @property
    def question(self) -> Question:
        """What follows the cached tokens."""

    def begin_layer(self, index: int, tokens: int) -> None:
        """Called when layer `index` is updated with `tokens` new tokens; the cache may change its phase for them."""


class TieredLayer(CacheLayerMixin):
    """One layer: its host tier, the scores of the question's rows, and, once sealed, its share of the device tier."""

    is_sliding = False
    sliding_window: int | None = None
    """Of a config that states a window longer than the model's contexts. The cache never holds more tokens."""
    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        cache: CacheOfLayers,
        order: LayerOrder,
        device_tier: DeviceTier,
        index: int,
        room: int,
        readers: int = 0,
    ) -> None:
        """index: among the layers of this kind. room: tokens for which the host tier is allocated at once. readers:
        later layers of the model that attend to this one's keys and values."""
        super().__init__()
        # Strong references would form a cycle that keeps the host tier after the cache's last user.
        self._cache: CacheOfLayers = weakref.proxy(cache)
        self._order: LayerOrder = weakref.proxy(order)
        self.device_tier, self.index, self.readers, self.room = device_tier, index, readers, room
        self.host: HostLayer | None = None
        self.rows: prefill.TextRows | None = None
        """Scores of the last call, over the layer and its readers; None if it was not scored."""
        self._attended = 0
        """How often it has attended in the last call."""
        self.sealed: SealedLayer | None = None
        self.digests: ContextDigests | None = None
        self.correcting = Correcting(device_tier)
        self._check: Callable[[], None] | None = None

    # ---- transformers' protocol

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._begin(key_states, value_states, attended_dtype(key_states))

    @settled
    def _begin(self, key_states: torch.Tensor, value_states: torch.Tensor, dtype: torch.dtype) -> None:
        _, heads, _, head_dim = key_states.shape
        if value_states.shape != key_states.shape:
            raise UnsupportedModelError("keys and values of different shapes are not supported.")
        self.begin(key_states.device, heads, head_dim, dtype)

    def begin(self, device: torch.device, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Allocate what a layer of the model on `device` needs before its first token."""
        host, _ = self._begin_at(device, heads, head_dim, dtype)
        self._reserve(host)
        self.device_tier.keep_first_tokens(self.index, host, self.device)
        self.is_initialized = True

    def _reserve(self, host: HostLayer) -> None:
        """Make room for the whole prompt or, if it is to be packed, for what comes before."""
        tier = self.device_tier
        host.reserve(self.room if tier.planned_bits() == PLAIN else sizes.first_tokens(tier.tiers, self.room))

    def _begin_at(
        self, device: torch.device, heads: int, head_dim: int, dtype: torch.dtype
    ) -> tuple[HostLayer, ContextDigests]:
        """Create the empty host tier and digests of a layer on `device`."""
        self.dtype, self.device, tier = dtype, device, self.device_tier
        tier.place(device, dtype)
        self.host = HostLayer(heads, head_dim, tier.tiers.chunk_tokens, dtype, tier.new_arena)
        self.digests = ContextDigests(tier, self.host, device)
        return self.host, self.digests

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if key_states.shape[0] != 1:
            raise OptionError(
                f"TieredCache holds one sequence, got a batch of {key_states.shape[0]}: run them one at a time."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._cache.begin_layer(self.index, key_states.shape[-2])
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

    # ---- attention

    @settled
    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        ahead: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cache new tokens and attend to them and all before: query, output `(H, n, D)`; keys, values `(K, n, D)`.

        Keys and values are kept in the dtype of the first ones; the output has the query's. The calls after the first
        are those of readers, with the same keys and values: they attend, and cache nothing. Their queries may be of the
        last tokens alone. ahead: as `prefill.attend_exactly` takes it; tokens that are decoded see none.
        """
        again = self._order.check_layer(self.index)
        self._check_once()
        query_dtype = query.dtype
        query, keys, values = (part.to(self.dtype) for part in (query, keys, values))
        with on_device(self.device):
            if self.sealed is None:
                out = self._prefill(query, keys, values, scaling, ahead, again)
            else:
                out = self.sealed.decode(query, keys, values, scaling, again)
            last = self._order.end_layer(self.index)
            if last and self.digests is not None and self.sealed is None:
                self.digests.update(new=self._last_keys(keys))
        return out.to(query_dtype)

    def _last_keys(self, new: torch.Tensor) -> torch.Tensor:
        """The keys on the device, as the model made them, that end with the last token: of all tokens, or the new."""
        resident, tokens = self.device_tier.residents.get(self.index), self.prompt_length
        return new if resident is None or resident.length < tokens else resident.keys[:, :tokens]

    def _check_once(self) -> None:
        if self._check is not None:
            self._check()
            self._check = None

    def _prefill(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        ahead: torch.Tensor | None,
        again: bool,
    ) -> torch.Tensor:
        (host, digests), question, n = self._context(), self._cache.question, keys.shape[1]
        tier, kept = self.device_tier, (keys.detach(), values.detach())
        if not again:
            digests.before_prompt()
            if host.length + n > host.capacity:
                tier.copies.drain()  # growing moves what copies read
                host.make_room(n)
        before = host.length - n if again else host.length
        with prefill.staged_past(tier, self.index, query.device, host, before, n, question) as past:
            past.stage_first()
            if past.resident is not None and not again:
                past.resident.put(*kept, before)
            if not again:  # written in the background, after the tokens that are being read
                tier.copies.submit("write back", lambda: host.write(*kept))
            out, lse = prefill.attend_exactly(query, keys, values, scaling, past, ahead)
            scored = None
            if rows := min(past.rows, query.shape[1]):
                scored = prefill.score_text_rows(
                    query[:, -rows:], lse[:, -rows:], keys, scaling, past, tier.tiers, question.looks
                )
            tier.copies.wait("write back")
        digests.observe(query, before)
        if again:
            self._attended += 1
            if self.rows is not None and scored is not None:
                self.rows = self.rows.with_reader(scored, self._attended, tier.tiers.policy.score_group)
            return out
        self.rows, self._attended = scored, 1
        if (resident := tier.residents.get(self.index)) is not None:
            resident.count(n, before)
        host.advance(n)
        return out

    # ---- the host tier

    def _context(self) -> tuple[HostLayer, ContextDigests]:
        """The host tier and the digests. The layer must have seen a token."""
        assert self.host is not None
        assert self.digests is not None
        return self.host, self.digests

    @property
    def prompt_length(self) -> int:
        """Tokens in the host tier: all but those generated since the last seal."""
        return 0 if self.host is None else self.host.length

    def append(self, keys: torch.Tensor, values: torch.Tensor, rows: prefill.TextRows | None = None) -> None:
        """Write tokens `(K, n, D)` to the host tier and digest the chunks they complete. rows: None: not scored."""
        host, digests = self._context()
        digests.before_prompt()
        self.rows = rows
        if (resident := self.device_tier.residents.get(self.index)) is not None:
            resident.append(keys, values, host.length)
        host.append(keys, values)
        digests.update()

    def append_stored(self, fields: tuple[torch.Tensor, ...]) -> None:
        """`append` for tokens as `HostLayer.stored` has returned them."""
        host, digests = self._context()
        digests.before_prompt()
        self.rows, before = None, host.length
        host.append_stored(fields)
        if (resident := self.device_tier.residents.get(self.index)) is not None:
            resident.append(*host.decoded(before, host.length), before)
        digests.update()

    def settle(self) -> None:
        """Treat the cached tokens as the context: digests are fitted to them and to no later ones."""
        if self.digests is not None:
            self.digests.settle()
        self.correcting.settle()
        if self.host is not None:
            self.host.freeze()

    def drop_unfit_rows(self) -> None:
        """Forget the rows of the last call if they lack the scores that the policy now depends on."""
        if self.rows is not None and self.rows.scores is None and self.device_tier.tiers.policy.scores_mass:
            self.rows = None

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens. Not while sealed."""
        if self.host is None or tokens >= self.host.length:
            return
        if tokens:
            self.host.truncate(tokens)
        else:
            self.host.clear()
            self.correcting.forget()
            self._reserve(self.host)
        if (resident := self.device_tier.residents.get(self.index)) is not None:
            resident.truncate(tokens)
        assert self.digests is not None
        self.digests.truncate(tokens)
        self.rows = None

    @settled
    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` needs: contiguous tensors in host memory, "kv" as words of 32 bits. Not while sealed."""
        host, digests = self._context()
        self._check_once()  # or damaged data would be saved with a valid checksum
        digested = digests.state()
        self.device_tier.copies.drain()
        records = host.arena_to_store(sizes.QUESTION_ROOM)
        return {"kv": records.view(torch.int32), **fit_state(host.fit), **digested, **self.correcting.state()}

    @settled
    def restore(
        self,
        state: dict[str, torch.Tensor],
        tokens: int,
        codec: Codec,
        device: torch.device,
        check: Callable[[], None],
    ) -> None:
        """Resume from the state of `tokens` tokens, whose "kv" is `(K, chunks, ...)`. codec: of these records. device:
        of the model's layer. check: called before they are first attended to; raises if they are damaged."""
        records = state["kv"].flatten(2).view(torch.uint8)
        host, digests = self._begin_at(device, records.shape[0], codec.head_dim, codec.dtype)
        host.adopt(self.device_tier.arena_of(records, tokens // codec.chunk_tokens), tokens, codec, fit_of(state))
        digests.restore(state)
        self.correcting.restore(state)
        self._check = check
        self.is_initialized = True

    def close(self) -> None:
        """Free the layer's memory."""
        self.rows = self.digests = self._check = None
        self.correcting.forget()
        if self.host is not None:
            self.host.close()

    def seal(self, static: torch.Tensor, is_text: torch.Tensor, phase: DecodePhase) -> None:
        """Enter the decode phase. static: `(K,)` mask of heads. is_text: `(N,)` mask of cached tokens."""
        host, digests = self._context()
        assert self.rows is not None
        digests.update(fit=True)
        packed, fitted, correction = digests.packed, digests.fitted, self.correcting.correction()
        self.sealed = SealedLayer(self.index, host, packed, fitted, static, self.rows, is_text, phase, correction)

    def unseal(self) -> None:
        """Go back to prefill: the tokens generated since the seal join the host tier."""
        if self.sealed is None:
            return
        keys, values = self.sealed.pages.generated_tokens()
        self.rows = None
        self.end_decoding()
        if keys.shape[1]:
            self.append(keys, values)

    def end_decoding(self) -> None:
        """Leave the decode phase, if the layer is in it, without the tokens generated since the seal."""
        self.sealed = None


def pack(layers: Sequence[TieredLayer], device_tier: DeviceTier, bits: int) -> None:
    """Store the host tier in `bits`; does nothing if it has them. No layer may be empty, nor a copy under way that
    writes to one."""
    device_tier.host_bits = bits
    for layer in layers:
        host, _ = layer._context()
        if host.codec.bits != bits:
            device_tier.copies.drain()
            host.pack(device_tier.codec(bits, layer.dtype), layer.room)
