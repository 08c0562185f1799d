"""Correcting: one layer's correction of predicted queries, fitted to its context while that is read."""

from __future__ import annotations

from concurrent.futures import Future

import torch

from tieredkv.cache.device_tier import DeviceTier
from tieredkv.environment.threads import at_most
from tieredkv.policy.correction import Correction, fit_correction

LEAST_TOKENS = 128
"""Of a call, for a correction to be fitted to it."""
ROWS = 512
"""Tokens of a call, evenly spread, that a correction is fitted to: with all of 2,048 hardly less is missed."""
GROWTH = 4
"""A correction is fitted again once the context is so many times as long: the first call may be unlike the rest."""
_NAMES = ("ahead.down", "ahead.offset", "ahead.up")
_FITTED_AT = "ahead.fitted_at"


class Correcting:
    """Fitted to the context, never to a question about it. Beside a card, fits run on another thread: each takes a
    processor some tenths of a second."""

    def __init__(self, device_tier: DeviceTier) -> None:
        self._device_tier = device_tier
        self._latest: Correction | None = None
        self._fitting: Future[Correction | None] | None = None
        self._fitted_at = 0
        """Tokens of the context, the call's included, when a fit was last begun."""
        self._settled = False

    def rows(self, past: int, tokens: int) -> int:
        """To how many tokens of a call of `tokens` a correction should be fitted. past: tokens before it."""
        if self._settled or tokens < LEAST_TOKENS or past + tokens < GROWTH * self._fitted_at:
            return 0
        return min(tokens, ROWS)

    def learn(self, rows: torch.Tensor, missed: torch.Tensor, length: int) -> None:
        """Fit to what was missed, `(n, O)`, of queries predicted from `rows` `(n, W)`, all on the layer's device.
        length: tokens of the context, the call's included."""
        self.correction()  # one that is there already is kept until this one is
        kept = rows.cpu(), missed.cpu()
        dtype, self._fitted_at = rows.dtype, length

        def fit() -> Correction | None:
            with torch.no_grad(), at_most(1):
                found = fit_correction(*kept)
                rounded = None if found is None else found.to(torch.device("cpu"), dtype)
            return rounded if rounded is not None and rounded.is_finite else None  # float16 ends at 65,504

        if rows.device.type == "cuda":
            self._fitting = self._device_tier.beside(fit, later=True)
        else:
            self._latest = fit()

    def correction(self, wait: bool = False) -> Correction | None:
        """The last one, on the host, in the dtype of the rows; None: there is none. wait: for a fit under way, too."""
        if self._fitting is not None and (wait or self._fitting.done()):
            fitting, self._fitting = self._fitting, None
            self._latest = fitting.result()
        return self._latest

    def settle(self) -> None:
        """The context is complete: nothing is fitted to later tokens."""
        self._settled = True

    def forget(self) -> None:
        """The context is another one from now on."""
        self._latest = self._fitting = None
        self._fitted_at, self._settled = 0, False

    def state(self) -> dict[str, torch.Tensor]:
        """For `restore`; empty without a correction."""
        found = self.correction(wait=True)
        return {} if found is None else dict(zip(_NAMES, (found.down, found.offset, found.up), strict=True))

    def unsettled(self) -> dict[str, torch.Tensor]:
        """For `resume`."""
        return {**self.state(), _FITTED_AT: torch.tensor([self._fitted_at], dtype=torch.int64, device="cpu")}

    def resume(self, state: dict[str, torch.Tensor]) -> None:
        """Continue a context that is not settled, from a state that contains an `unsettled`. Older ones have none."""
        self.restore(state)
        self._fitted_at, self._settled = int(state.get(_FITTED_AT, 0)), False

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """From a state that contains a `state`, or nothing of it, of a settled context."""
        self._settled = True
        if all(name in state for name in _NAMES):
            self._latest = Correction(*(state[name] for name in _NAMES))
