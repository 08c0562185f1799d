"""The digests of one layer's chunks while a prompt grows, and what they are fitted to. They lie on the host."""

from __future__ import annotations

import torch

from tieredkv.cache.device_tier import DeviceTier
from tieredkv.memory.host import HostLayer
from tieredkv.memory.ledger import on_device
from tieredkv.memory.units import FLOAT32
from tieredkv.ops.select import ops_for
from tieredkv.policy.base import Policy
from tieredkv.policy.digests import sketch, vectors

MOST_CHUNKS = 1024
"""Chunks digested at a time."""
FIT_TOKENS = 4096
"""Tokens that a basis is fitted to: the first of the prompt."""


def _name(method: Policy) -> str:
    """What a saved file calls digests of this kind."""
    return f"digests.{method.digest}.{method.digest_bits}"


class ContextDigests:
    """Digests of every whole chunk of a layer, of the kind that the cache's policy asks for at the time.

    Kinds that need a basis wait until there are `FIT_TOKENS` tokens to fit it to, or somebody asks to make do with what
    there is. Once `settle` was called nothing that follows is fitted to: no answer depends on an earlier question.
    """

    def __init__(self, device_tier: DeviceTier, host: HostLayer, device: torch.device) -> None:
        """device_tier: for its policy, copies and ledger. device: where digests are made."""
        self._device_tier, self._host, self._device = device_tier, host, device
        self._packed: torch.Tensor | None = None
        self._name = ""
        self._digested = 0
        self.basis: sketch.Basis | None = None
        shape = host.num_heads, host.head_dim, host.head_dim
        self.query_moment = torch.zeros(shape, dtype=torch.float32, device="cpu")
        """`(K, D, D)`: sum of q q^T over the context's first rows, to fit a basis to."""
        self._fitted_to = 0
        self._settled = False

    @property
    def packed(self) -> torch.Tensor:
        """uint8 `(K, chunks, bytes)` on the host, of the chunks digested so far or more."""
        if self._packed is None:
            return torch.empty((self._host.num_heads, 0, 0), dtype=torch.uint8, device="cpu")
        return self._packed

    def before_prompt(self) -> None:
        """Before tokens are written: what has been asked for since, fitted to what is there and not to them."""
        if self._settled:
            self.update(fit=True)

    def observe(self, query: torch.Tensor) -> None:
        """Take note of the queries `(H, n, D)` of tokens about to be counted, if a basis may be fitted to them."""
        if not self._settled and self._host.length < FIT_TOKENS:
            grouped = query.detach().reshape(self._host.num_heads, -1, query.shape[-1]).float()
            self.query_moment = self.query_moment + (grouped.transpose(1, 2) @ grouped).cpu()

    def update(self, fit: bool = False) -> None:
        """Digest every whole chunk that has no digest. fit: with a basis fitted to what there is, if it has to be.

        A basis that was fitted to less, in a context that is not settled, is fitted again when the context has doubled.
        """
        method, c = self._device_tier.tiers.policy, self._host.chunk_tokens
        kind, bits, name = vectors.DIGESTS[method.digest], method.digest_bits, _name(method)
        if self._name != name:
            self._packed, self._digested, self.basis, self._name = None, 0, None, name
        whole, most = self._host.length // c, max(1, FIT_TOKENS // c)
        outgrown = not self._settled and self._fitted_to < most and whole >= 2 * self._fitted_to
        if kind.fitted and self.basis is not None and outgrown:
            self._packed, self._digested, self.basis = None, 0, None
        if kind.fitted and self.basis is None:
            if whole == 0 or (self._host.length < FIT_TOKENS and not fit):
                return
            self._fitted_to = min(whole, most)
            self._device_tier.copies.drain()  # the host reads what was written back
            keys = self._host.chunks(0, self._fitted_to)[:, :, 0].flatten(1, 2)
            self.basis = sketch.fit(self.query_moment, keys, bits)
        held = [] if self._packed is None else [self._packed[:, : self._digested]]
        basis = None if self.basis is None else self.basis.to(self._device)
        at_once = self._chunks_at_once(whole - self._digested)
        new = [
            self._make(kind, bits, basis, first, min(first + at_once, whole))
            for first in range(self._digested, whole, at_once)
        ]
        if new:
            self._packed = torch.cat([*held, *new], dim=1)
            self._digested = whole

    def _chunks_at_once(self, most: int) -> int:
        """On a card, as many as the cap leaves room for."""
        room = (
            MOST_CHUNKS if self._device.type == "cpu" else self._device_tier.ledger.free_bytes // self._scratch_bytes(1)
        )
        return max(1, min(MOST_CHUNKS, most, room))

    def _scratch_bytes(self, chunks: int) -> int:
        """Device bytes of digesting chunks: what is staged, three copies in float32."""
        tokens = chunks * self._host.num_heads * self._host.chunk_tokens
        return tokens * self._host.head_dim * (2 * self._host.dtype.itemsize + 3 * FLOAT32)

    def _make(self, kind: vectors.Digest, bits: int, basis: sketch.Basis | None, first: int, stop: int) -> torch.Tensor:
        """Digests of chunks first..stop, on the host; made on the device."""
        chunks = self._host.chunks(first, stop)
        if self._device.type == "cpu":
            return kind.make(chunks[:, :, 0], bits, basis)
        with on_device(self._device), self._device_tier.ledger.scratch("digesting", self._scratch_bytes(stop - first)):
            staged = torch.empty(chunks.shape, dtype=self._host.dtype, device=self._device)
            self._device_tier.transfer.stage(chunks, staged, with_values=True)
            make = ops_for(self._device).pack_sketches if kind.fitted else kind.make
            return make(staged[:, :, 0], bits, basis).cpu()

    def settle(self) -> None:
        """What is cached is the context of all that follows: digests are fitted to it and to nothing else."""
        self.update(fit=True)
        self._settled = True

    def truncate(self, tokens: int) -> None:
        """Forget the digests of all but the first `tokens` tokens; of none, what was settled and fitted too."""
        self._digested = min(self._digested, tokens // self._host.chunk_tokens)
        if tokens == 0:
            self.basis, self._settled = None, False
            self.query_moment = torch.zeros_like(self.query_moment)

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` needs, contiguous. Settles."""
        self.settle()
        tensors = {"query_moment": self.query_moment}
        if self._packed is not None:
            tensors[self._name] = self._packed[:, : self._digested].contiguous()
        if self.basis is not None:
            for part in ("down", "up", "centre"):
                tensors[f"{self._name}.{part}"] = getattr(self.basis, part)
        return tensors

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Take a settled state. Digests of another kind than the policy's are made anew before they are used."""
        self._name = _name(self._device_tier.tiers.policy)
        self._packed = state.get(self._name)
        self._digested = 0 if self._packed is None else self._packed.shape[1]
        self.query_moment, self._settled = state["query_moment"], True
        if f"{self._name}.up" in state:
            self.basis = sketch.Basis(*(state[f"{self._name}.{part}"] for part in ("down", "up", "centre")))
