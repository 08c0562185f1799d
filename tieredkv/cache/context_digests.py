"""The digests of one layer's chunks while a prompt grows, and the state that they are fitted to; all on the host."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import torch

from tieredkv.cache.device_tier import DeviceTier
from tieredkv.environment.ambient import settled
from tieredkv.environment.threads import at_most
from tieredkv.memory.capturing import CAPTURE
from tieredkv.memory.host import HostLayer
from tieredkv.memory.ledger import on_device
from tieredkv.ops.select import ops_for
from tieredkv.planning.prefill_plan import digesting_bytes
from tieredkv.policy.digests import DIGESTS, Digest, Fitted

MOST_CHUNKS = 1024
"""Chunks to digest at a time."""
FIT_TOKENS = 4096
"""First tokens of the prompt that a digest is fitted to."""
MOMENTS = 2
"""Sums of q q^T on their way from the card before the host waits for them: one of each call of the default size that
is fitted to."""


class ContextDigests:
    """Digests of every whole chunk of a layer, of the kind that the policy names at the time.

    A kind that needs a fit waits for `FIT_TOKENS` tokens, unless `update(fit=True)` fits it to fewer. After `settle`
    nothing is fitted to later tokens, so no answer depends on an earlier question.

    On a card nothing waits while a prompt is read: digests are made there and arrive in page-locked memory, and they
    are fitted on another thread, as that takes as long as the card needs for a whole call. Chunks wait meanwhile.
    """

    def __init__(self, device_tier: DeviceTier, host: HostLayer, device: torch.device) -> None:
        """device_tier: for its policy, copies and ledger. device: where digests are made."""
        self._device_tier, self._host, self._device = device_tier, host, device
        self.fitted: Fitted | None = None
        """The state that the digests were made with; None: not fitted yet, and there are no digests."""
        shape = host.num_heads, host.head_dim, host.head_dim
        self._moment = torch.zeros(shape, dtype=torch.float32, device="cpu")
        self._arriving: list[torch.Tensor] = []
        self._free: list[torch.Tensor] = []
        """Host memory of moments: to be added once they have arrived, and to be used again."""
        self._fitting: Future[Fitted] | None = None
        self._store: torch.Tensor | None = None
        """Room for digests; those of the first `_digested` chunks are there."""
        self._shared = False
        """Whether others hold the store, so that it must not change."""
        self._name = ""
        self._digested = self._fitted_to = 0
        """Numbers of chunks."""
        self._settled = False

    @property
    def packed(self) -> torch.Tensor:
        """uint8 `(K, chunks, bytes)` on the host, of the chunks digested so far."""
        if self._store is None:
            return torch.empty((self._host.num_heads, 0, 0), dtype=torch.uint8, device="cpu")
        self._wait()
        return self._store[:, : self._digested]

    @property
    def query_moment(self) -> torch.Tensor:
        """`(K, D, D)`: sum of q q^T over the context's first rows, which digests are fitted to."""
        if self._arriving:
            self._wait()
            for part in self._arriving:
                self._moment = self._moment + part
            self._free, self._arriving = self._free + self._arriving, []
        return self._moment

    def _wait(self) -> None:
        """For what comes from a card, before the host reads it."""
        if self._device.type == "cuda":
            with CAPTURE:
                torch.cuda.current_stream(self._device).synchronize()

    def _digest(self) -> Digest[Any]:
        """The kind that the policy names now, by the fastest implementation."""
        policy, host = self._device_tier.tiers.policy, self._host
        digest = DIGESTS[policy.digest](host.head_dim, host.chunk_tokens, policy.digest_bits)
        return ops_for(self._device).digest(digest)

    def before_prompt(self) -> None:
        """Call before tokens are written after a settled context: missing digests are fitted to it without them."""
        if self._settled:
            self.update(fit=True)

    def observe(self, query: torch.Tensor, before: int) -> None:
        """Add the queries `(H, n, D)` of tokens after the first `before` ones to `query_moment`, if it is open."""
        if not self._settled and before < FIT_TOKENS:
            grouped = query.detach().reshape(self._host.num_heads, -1, query.shape[-1]).float()
            moment = grouped.transpose(1, 2) @ grouped
            if self._device.type == "cpu":
                self._moment = self._moment + moment
                return
            if len(self._arriving) == MOMENTS:
                self._moment = self.query_moment
            memory = self._free.pop() if self._free else self._device_tier.page_locked(moment.shape, moment.dtype)
            self._arriving.append(memory.copy_(moment, non_blocking=True))

    def update(self, fit: bool = False, new: torch.Tensor | None = None) -> None:
        """Digest every whole chunk that has no digest. fit: fit even to few tokens, and wait for it. new: keys
        `(K, n, D)` of the last tokens, as the model made them, on the device.

        Digests fitted to few tokens are fitted and computed again once an unsettled context has doubled.
        """
        digest, host = self._digest(), self._host
        whole, most = host.length // host.chunk_tokens, max(1, FIT_TOKENS // host.chunk_tokens)
        if self._name != (name := _file_name(digest)):
            self._name = name
            self._forget()
        elif digest.needs_fit and not self._settled and self._fitted_to < most and whole >= 2 * self._fitted_to:
            self._forget()
        if self.fitted is None and not digest.needs_fit:
            self.fitted = Fitted()
        elif self.fitted is None and not self._fit(digest, min(whole, most), fit):
            return
        if self._digested == whole:
            return
        assert self.fitted is not None
        fitted, at_once = self.fitted.to(self._device), self._chunks_at_once(whole - self._digested)
        for first in range(self._digested, whole, at_once):
            stop = min(first + at_once, whole)
            self._make(digest, fitted, first, stop, new)
            self._digested = stop

    def _fit(self, digest: Digest[Any], chunks: int, now: bool) -> bool:
        """Fit to the first `chunks` chunks, if they are enough or `now` is set. Returns whether that is done."""
        if self._fitting is None:
            if chunks == 0 or (self._host.length < FIT_TOKENS and not now):
                return False
            self._fitted_to = chunks
            self._device_tier.copies.drain()  # the host reads what was written back
            moment, keys = self.query_moment, self._host.keys(0, chunks).flatten(1, 2)

            @settled
            def fitted() -> Fitted:
                return digest.fit(moment, keys)

            if self._device.type == "cpu":
                self.fitted = fitted()
                return True

            def beside() -> Fitted:
                with at_most(1):  # or it would take processors from the thread that feeds the card
                    return fitted()

            self._fitting = self._device_tier.beside(beside)
        if not (now or self._fitting.done()):
            return False
        found = self._fitting.result()
        parts = {name: self._device_tier.page_locked(part.shape, part.dtype) for name, part in found.tensors().items()}
        self.fitted = type(found)(**{name: parts[name].copy_(part) for name, part in found.tensors().items()})
        self._fitting = None
        return True

    def _forget(self) -> None:
        self._put_in(None)
        self._digested = 0
        self._drop_fit()

    def _drop_fit(self) -> None:
        if self.fitted is not None:
            for part in self.fitted.tensors().values():
                self._device_tier.unlock(part)
        self.fitted = self._fitting = None

    def _put_in(self, store: torch.Tensor | None) -> None:
        """Use another store, of one's own."""
        self._shared = False
        if self._store is not None and self._store is not store:
            self._device_tier.unlock(self._store)
        self._store = store

    def _chunks_at_once(self, most: int) -> int:
        """On a card, as many as the cap leaves room for."""
        if self._device.type != "cpu":
            tier = self._device_tier
            most = min(most, tier.ledger.free_bytes // digesting_bytes(tier.shape, tier.tiers, 1))
        return max(1, min(MOST_CHUNKS, most))

    def _make(self, digest: Digest[Any], fitted: Fitted, first: int, stop: int, new: torch.Tensor | None) -> None:
        """Digest chunks first..stop, on the device."""
        host, tier = self._host, self._device_tier
        if self._device.type == "cpu":
            self._keep(first, digest.make(host.keys(first, stop), fitted))
            return
        scratch = digesting_bytes(tier.shape, tier.tiers, stop - first)
        with on_device(self._device), tier.ledger.scratch("digesting", scratch):
            keys = self._of_new(first, stop, new)
            if keys is None:
                shape = host.num_heads, stop - first, host.codec.chunk_bytes
                staged = torch.empty(shape, dtype=torch.uint8, device=self._device)
                host.stage(first, stop, staged, with_values=True)
                keys = host.keys_of(staged)
            self._keep(first, digest.make(keys, fitted))

    def _of_new(self, first: int, stop: int, new: torch.Tensor | None) -> torch.Tensor | None:
        """Keys `(K, n, C, D)` of chunks first..stop, if they are among the new ones and stored as those are."""
        c = self._host.chunk_tokens
        if new is None or self._host.codec.needs_fit or (skipped := first * c - self._host.length + new.shape[1]) < 0:
            return None
        keys = new[:, skipped : skipped + (stop - first) * c]
        return (keys if keys.stride(1) == keys.shape[2] else keys.contiguous()).unflatten(1, (-1, c))

    def _keep(self, first: int, made: torch.Tensor) -> None:
        """Store digests `(K, n, bytes)` as those of chunk `first` and later ones. Those of a card arrive later."""
        heads, n, nbytes = made.shape
        if self._store is None or self._shared or self._store.shape[1] < first + n:
            room = max(first + n, self._host.capacity // self._host.chunk_tokens)
            store = self._device_tier.page_locked((heads, room, nbytes), made.dtype)
            store[:, :first] = self.packed[:, :first] if first else 0
            self._put_in(store)
        assert self._store is not None
        for own, head in zip(self._store[:, first : first + n], made, strict=True):  # contiguous copies
            own.copy_(head, non_blocking=True)

    @property
    def kind(self) -> str:
        """The name on disk of the kind of digests that there are; empty if there are none."""
        return "" if self._store is None else self._name

    def unsettled(self) -> dict[str, torch.Tensor]:
        """What `resume` needs besides the digests."""
        fitted = {} if self._store is None or self.fitted is None else self.fitted.tensors()
        return {"query_moment": self.query_moment, **{f"fitted.{name}": part for name, part in fitted.items()}}

    def resume(self, kind: str, packed: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        """Continue a context that is not settled. kind, packed: its digests. If they are not of the policy's kind, new
        ones are computed, as they are after a change of the policy."""
        digest = self._digest()
        self._moment, self._arriving = state["query_moment"], []
        if kind != _file_name(digest):
            return
        self._name, self._store, self._digested = kind, packed, packed.shape[1]
        self.fitted = digest.fitted_type(**{name: state[f"fitted.{name}"] for name in digest.fitted_type.names()})
        self._fitted_to = min(self._digested, max(1, FIT_TOKENS // self._host.chunk_tokens))

    def settle(self) -> None:
        """Declare the cached tokens the context: digests are fitted to them and to no later ones."""
        self.update(fit=True)
        self._settled = True

    def truncate(self, tokens: int) -> None:
        """Forget the digests of all but the first `tokens` tokens; at 0, also what was fitted and settled."""
        if self._fitting is not None:
            self._fitting.exception()  # it reads keys that later ones will replace
        self._digested = min(self._digested, tokens // self._host.chunk_tokens)
        if tokens == 0:
            self._drop_fit()
            self._moment, self._settled = torch.zeros_like(self._moment), False
            self._free, self._arriving = self._free + self._arriving, []

    def state(self) -> dict[str, torch.Tensor]:
        """Settle, and return what `restore` needs, contiguous."""
        self.settle()
        tensors = {"query_moment": self.query_moment}
        if self._store is not None:
            self._put_in(self.packed.contiguous())
            tensors[self._name], self._shared = self._store, True
        if self.fitted is not None:
            tensors |= {f"{self._name}.{name}": tensor for name, tensor in self.fitted.tensors().items()}
        return tensors

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Restore a settled state. If its digests are not of the policy's kind, new ones are computed before use."""
        digest = self._digest()
        self._name = _file_name(digest)
        self._store, self._shared = state.get(self._name), True
        self._digested = 0 if self._store is None else self._store.shape[1]
        self._moment, self._settled = state["query_moment"], True
        saved = {field: state.get(f"{self._name}.{field}") for field in digest.fitted_type.names()}
        if all(tensor is not None for tensor in saved.values()):
            self.fitted = digest.fitted_type(**saved)


def _file_name(digest: Digest[Any]) -> str:
    """Name of digests of this kind in a saved session; fields of the fitted state follow after a dot."""
    return f"digests.{digest.name}.{digest.bits}"
