"""The digests of one layer's chunks while a prompt grows, and the state that they are fitted to; all on the host."""

from __future__ import annotations

from typing import Any

import torch

from tieredkv.cache.device_tier import DeviceTier
from tieredkv.memory.host import HostLayer
from tieredkv.memory.ledger import on_device
from tieredkv.ops.select import ops_for
from tieredkv.planning.prefill_plan import digesting_bytes
from tieredkv.policy.digests import DIGESTS, Digest, Fitted

MOST_CHUNKS = 1024
"""Chunks to digest at a time."""
FIT_TOKENS = 4096
"""First tokens of the prompt that a digest is fitted to."""


class ContextDigests:
    """Digests of every whole chunk of a layer, of the kind that the policy names at the time.

    A kind that needs a fit waits for `FIT_TOKENS` tokens, unless `update(fit=True)` fits it to fewer. After `settle`
    nothing is fitted to later tokens, so no answer depends on an earlier question.
    """

    def __init__(self, device_tier: DeviceTier, host: HostLayer, device: torch.device) -> None:
        """device_tier: for its policy, copies and ledger. device: where digests are made."""
        self._device_tier, self._host, self._device = device_tier, host, device
        self.fitted: Fitted | None = None
        """The state that the digests were made with; None: not fitted yet, and there are no digests."""
        shape = host.num_heads, host.head_dim, host.head_dim
        self.query_moment = torch.zeros(shape, dtype=torch.float32, device="cpu")
        """`(K, D, D)`: sum of q q^T over the context's first rows, which digests are fitted to."""
        self._packed: torch.Tensor | None = None
        self._name = ""
        self._digested = self._fitted_to = 0
        """Numbers of chunks."""
        self._settled = False

    @property
    def packed(self) -> torch.Tensor:
        """uint8 `(K, chunks, bytes)` on the host, of the chunks digested so far or more."""
        if self._packed is None:
            return torch.empty((self._host.num_heads, 0, 0), dtype=torch.uint8, device="cpu")
        return self._packed

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
            self.query_moment = self.query_moment + (grouped.transpose(1, 2) @ grouped).cpu()

    def update(self, fit: bool = False) -> None:
        """Digest every whole chunk that has no digest. fit: fit even to few tokens.

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
        elif self.fitted is None:
            if whole == 0 or (host.length < FIT_TOKENS and not fit):
                return
            self._fitted_to = min(whole, most)
            self._device_tier.copies.drain()  # the host reads what was written back
            self.fitted = digest.fit(self.query_moment, host.keys(0, self._fitted_to).flatten(1, 2))
        fitted, at_once = self.fitted.to(self._device), self._chunks_at_once(whole - self._digested)
        new = [
            self._make(digest, fitted, first, min(first + at_once, whole))
            for first in range(self._digested, whole, at_once)
        ]
        if new:
            before = [] if self._packed is None else [self._packed[:, : self._digested]]
            self._packed = torch.cat([*before, *new], dim=1)
            self._digested = whole

    def _forget(self) -> None:
        self._packed, self._digested, self.fitted = None, 0, None

    def _chunks_at_once(self, most: int) -> int:
        """On a card, as many as the cap leaves room for."""
        if self._device.type != "cpu":
            tier = self._device_tier
            most = min(most, tier.ledger.free_bytes // digesting_bytes(tier.shape, tier.tiers, 1))
        return max(1, min(MOST_CHUNKS, most))

    def _make(self, digest: Digest[Any], fitted: Fitted, first: int, stop: int) -> torch.Tensor:
        """Digests of chunks first..stop, on the host; made on the device."""
        host, tier = self._host, self._device_tier
        if self._device.type == "cpu":
            return digest.make(host.keys(first, stop), fitted)
        scratch = digesting_bytes(tier.shape, tier.tiers, stop - first)
        with on_device(self._device), tier.ledger.scratch("digesting", scratch):
            shape = host.num_heads, stop - first, host.codec.chunk_bytes
            staged = torch.empty(shape, dtype=torch.uint8, device=self._device)
            host.stage(first, stop, staged, with_values=True)
            return digest.make(host.keys_of(staged), fitted).cpu()

    @property
    def kind(self) -> str:
        """The name on disk of the kind of digests that there are; empty if there are none."""
        return "" if self._packed is None else self._name

    def unsettled(self) -> dict[str, torch.Tensor]:
        """What `resume` needs besides the digests."""
        fitted = {} if self._packed is None or self.fitted is None else self.fitted.tensors()
        return {"query_moment": self.query_moment, **{f"fitted.{name}": part for name, part in fitted.items()}}

    def resume(self, kind: str, packed: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        """Continue a context that is not settled. kind, packed: its digests. If they are not of the policy's kind, new
        ones are computed, as they are after a change of the policy."""
        digest = self._digest()
        self.query_moment = state["query_moment"]
        if kind != _file_name(digest):
            return
        self._name, self._packed, self._digested = kind, packed, packed.shape[1]
        self.fitted = digest.fitted_type(**{name: state[f"fitted.{name}"] for name in digest.fitted_type.names()})
        self._fitted_to = min(self._digested, max(1, FIT_TOKENS // self._host.chunk_tokens))

    def settle(self) -> None:
        """Declare the cached tokens the context: digests are fitted to them and to no later ones."""
        self.update(fit=True)
        self._settled = True

    def truncate(self, tokens: int) -> None:
        """Forget the digests of all but the first `tokens` tokens; at 0, also what was fitted and settled."""
        self._digested = min(self._digested, tokens // self._host.chunk_tokens)
        if tokens == 0:
            self.fitted, self._settled = None, False
            self.query_moment = torch.zeros_like(self.query_moment)

    def state(self) -> dict[str, torch.Tensor]:
        """Settle, and return what `restore` needs, contiguous."""
        self.settle()
        tensors = {"query_moment": self.query_moment}
        if self._packed is not None:
            tensors[self._name] = self._packed[:, : self._digested].contiguous()
        if self.fitted is not None:
            tensors |= {f"{self._name}.{name}": tensor for name, tensor in self.fitted.tensors().items()}
        return tensors

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Restore a settled state. If its digests are not of the policy's kind, new ones are computed before use."""
        digest = self._digest()
        self._name = _file_name(digest)
        self._packed = state.get(self._name)
        self._digested = 0 if self._packed is None else self._packed.shape[1]
        self.query_moment, self._settled = state["query_moment"], True
        saved = {field: state.get(f"{self._name}.{field}") for field in digest.fitted_type.names()}
        if all(tensor is not None for tensor in saved.values()):
            self.fitted = digest.fitted_type(**saved)


def _file_name(digest: Digest[Any]) -> str:
    """Name of digests of this kind in a saved session; fields of the fitted state follow after a dot."""
    return f"digests.{digest.name}.{digest.bits}"
