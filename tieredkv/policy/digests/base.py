"""Digest: the contract of every kind of digest. Nothing outside this package depends on which kind is used.

Shapes: `K` KV heads, `n` chunks, `C` chunk tokens, `D` head dim, `G` query heads per KV head, or several rows of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar, Generic, Self, TypeVar, cast

import torch

BITS = (4, 8)
"""Bits per number that every digest offers."""
FLOAT32 = torch.float32.itemsize


@dataclass(frozen=True, slots=True)
class Fitted:
    """State of a fitted digest, one row per KV head. The only fields of a subclass are tensors `(K, ...)`. This class
    itself is the state of digests that need no fit.

    A saved session stores the fields by name.
    """

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the fields."""
        return tuple(field.name for field in fields(cls))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields by name."""
        return {name: getattr(self, name) for name in self.names()}

    def to(self, device: torch.device) -> Self:
        """A copy on `device`, for its current stream; the same tensors where they are there already. Does not wait for
        a card."""
        later = torch.device(device).type != "cpu"
        return type(self)(**{name: part.to(device, non_blocking=later) for name, part in self.tensors().items()})

    def for_ranking(self, heads: torch.Tensor) -> Self:
        """The part that ranking needs, for `heads` `(n,)`; digests cannot be made with it."""
        return type(self)(**{name: tensor[heads] for name, tensor in self.tensors().items()})

    @property
    def nbytes(self) -> int:
        """Bytes of all fields."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


F = TypeVar("F", bound=Fitted)


@dataclass(frozen=True)
class Digest(ABC, Generic[F]):
    """One kind of digest: a small stand-in for a chunk's keys, by which the chunks of a head are ranked.

    A kind is a subclass, entered in `DIGESTS`; an instance knows the sizes of one model and policy. Sizes are per KV
    head. Nothing here waits for the device.
    """

    head_dim: int
    chunk_tokens: int
    bits: int
    """Per number of a digest: one of `BITS`."""

    name: ClassVar[str]
    """In `DIGESTS`, in `Policy.digest`, and in saved sessions."""
    estimates_mass: ClassVar[bool] = False
    """Whether `logits` plus `constant` estimate the log of each chunk's attention mass, without bias. The mass that a
    step did not see can then be estimated, and `TierConfig.adaptive` works. Upper bounds, such as those of boxes, do
    not."""
    fitted_type: ClassVar[type[Fitted]] = Fitted
    """Type of the state that `fit` returns; a kind that needs a fit sets its own."""

    @property
    def needs_fit(self) -> bool:
        """Whether chunks can be digested only after `fit`."""
        return self.fitted_type is not Fitted

    # ---- sizes

    @property
    @abstractmethod
    def chunk_bytes(self) -> int:
        """Bytes of one chunk's digest, on the host and on the device."""

    @property
    def fitted_bytes(self) -> int:
        """Bytes of what `fit` returns, on the host."""
        return 0

    @property
    def ranking_fitted_bytes(self) -> int:
        """Bytes of the part of it that `Fitted.for_ranking` keeps, on the device."""
        return 0

    @abstractmethod
    def scratch_bytes(self, kv_heads: int, query_heads: int) -> int:
        """Upper bound of what `logits` allocates besides its result, per chunk ranked at a time, for a layer."""

    # ---- making

    def fit(self, query_moment: torch.Tensor, keys: torch.Tensor) -> F:
        """The state for one layer, on the host, fitted to the cached part of a context; empty unless `needs_fit`.

        query_moment `(K, D, D)` float32: sum of q q^T. keys `(K, m, D)`.
        """
        return cast("F", self.fitted_type())  # TypeError if a kind with a state does not fit it

    @abstractmethod
    def make(self, keys: torch.Tensor, fitted: F) -> torch.Tensor:
        """Digests, uint8 `(K, n, chunk_bytes)`, of chunks of keys `(K, n, C, D)`, on the keys' device."""

    # ---- ranking

    def arranged(self, digests: torch.Tensor) -> torch.Tensor:
        """Digests `(K, n, chunk_bytes)` as `logits` reads them: the same bytes, in an order that may differ by
        implementation."""
        return digests

    def project(
        self, query: torch.Tensor, heads: torch.Tensor, scaling: float, fitted: F
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries as `logits` takes them, `(n, rows, ...)`, and their `constant` `(n, rows)`, None unless
        `estimates_mass`.

        query `(K, rows, D)` in its own dtype, of which the rows `heads` `(n,)` count. fitted: of these heads.
        """
        scaled = query[heads].float() * scaling
        return self.prepare(scaled, fitted), self.constant(scaled, fitted) if self.estimates_mass else None

    def prepare(self, query: torch.Tensor, fitted: F) -> torch.Tensor:
        """Convert scaled queries `(K, G, D)` float32 to the form that `logits` takes, `(K, G, ...)`."""
        return query

    def logits(self, prepared: torch.Tensor, digests: torch.Tensor, at_once: int) -> torch.Tensor:
        """Estimated logits `(K, G, n)` float32 of all chunks, up to a constant for each query head.

        prepared: from `prepare`. digests `(K, n, chunk_bytes)`: from `arranged`. at_once: chunks to unpack at a time,
        which bounds the scratch; an implementation that unpacks nothing ignores it.
        """
        parts = [self.chunk_logits(prepared, part) for part in digests.split(at_once, dim=1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def logits_in_parts(
        self, prepared: torch.Tensor, digests: torch.Tensor, at_once: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`logits`, and the log-sum-exp `(K, G, any)` of each of some parts of them that together are all; None: an
        implementation that does not get these for nothing."""
        return self.logits(prepared, digests, at_once), None

    @abstractmethod
    def chunk_logits(self, prepared: torch.Tensor, digests: torch.Tensor) -> torch.Tensor:
        """`logits` of one part, in plain torch."""

    def constant(self, query: torch.Tensor, fitted: F) -> torch.Tensor:
        """The constant that `logits` leaves out, `(K, G)`, for scaled queries `(K, G, D)`, if `estimates_mass`."""
        return query.new_zeros(query.shape[:-1])
