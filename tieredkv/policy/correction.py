"""What a prediction of a layer's query misses, as a linear function of what it was predicted from. Ours.

A layer's own projection, applied to an earlier residual stream (`models.sight`), misses what the layers between add to
it. Over a context that is much the same function of the stream, and a few directions of it are enough
(`benchmarks/ahead.py`). Shapes: `n` tokens, `W` width of the stream, `O` numbers of a query, all heads together, `r`
rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

RANK, LEAST_WIDTHS = 64, 8
"""Directions at most, and at most one for so many of the stream's: with 16 a few per cent more is missed, with 256
hardly less."""
RIDGE = 0.1
"""Damping, relative to the mean square of the stream's numbers: rows are fewer than the stream is wide."""
ROUNDING = 1e-6
"""Squares of singular values, relative to the largest, that float32 does not tell from 0."""


@dataclass(frozen=True, slots=True)
class Correction:
    """Adds `(rows @ down + offset) @ up` to a predicted query."""

    down: torch.Tensor
    """`(W, r)`."""
    offset: torch.Tensor
    """`(r,)`."""
    up: torch.Tensor
    """`(r, O)`."""

    def corrected(self, rows: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """Queries `(n, O)` from predicted ones, made from `rows` `(n, W)`; all on the same device, of one dtype."""
        return torch.addmm(predicted, torch.addmm(self.offset, rows, self.down), self.up)

    def to(self, device: torch.device, dtype: torch.dtype) -> Correction:
        """The same elsewhere, in another dtype."""
        return Correction(*(part.to(device, dtype) for part in (self.down, self.offset, self.up)))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.down, self.offset, self.up))

    @property
    def is_finite(self) -> bool:
        """Waits for the device."""
        return all(bool(part.isfinite().all()) for part in (self.down, self.offset, self.up))


def rank_of(width: int) -> int:
    """The most directions of a correction."""
    return max(1, min(RANK, width // LEAST_WIDTHS))


def fit_correction(rows: torch.Tensor, missed: torch.Tensor) -> Correction | None:
    """The best of `rank_of(W)`, or of as many directions as there are rows, in float32: reduced-rank ridge regression.
    None if there is none, as numbers are not finite. Directions that rounding makes up are zeros.

    rows `(n, W)`: from which queries were predicted. missed `(n, O)`: by how much. Solved for the rows, as these are
    fewer than W: with K = X X^T, where X has a column of ones, the ridge solution is X^T A with (K + d) A = missed, and
    the rank is reduced to the principal directions of what it predicts for the rows, K A.
    """
    rows, missed = rows.float(), missed.float()
    damping = max(RIDGE * float(rows.square().sum()) / rows.shape[1], 1e-4)  # rows may be zeros
    kernel = rows @ rows.T + 1
    kernel.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(kernel)
    dual = torch.cholesky_solve(missed, factor)
    fitted = missed - damping * dual
    products = fitted @ fitted.T
    if int(failed) or not bool(products.isfinite().all()):
        return None
    try:
        squares, directions = torch.linalg.eigh(products)
    except torch.linalg.LinAlgError:  # it did not converge
        return None
    rank = min(rank_of(rows.shape[1]), len(rows))
    best, squares = directions[:, -rank:], squares[-rank:]
    scale = torch.where(squares > ROUNDING * squares[-1], squares.clamp(min=1e-30).rsqrt(), 0)
    up = (fitted.T @ best * scale).T
    coefficients = dual @ up.T
    return Correction((rows.T @ coefficients).contiguous(), coefficients.sum(0), up.contiguous())
