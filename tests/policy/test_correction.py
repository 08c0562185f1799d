"""What corrects predicted queries: a ridge regression of few directions."""

from __future__ import annotations

import pytest
import torch

from tieredkv.policy.correction import RANK, RIDGE, fit_correction, rank_of


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def missed_by(rows, correction):
    return correction.corrected(rows, torch.zeros(len(rows), correction.up.shape[1]))


def test_what_few_directions_explain_is_found():
    """Of other rows than those that it was fitted to, a constant included, less what the ridge takes."""
    down, up = numbers(64, 4, seed=1), numbers(4, 40, seed=2)
    correction = fit_correction(rows := numbers(2000, 64), rows @ down @ up + 3)
    other = numbers(50, 64, seed=3)
    wanted = other @ down @ up + 3
    assert float((missed_by(other, correction) - wanted).norm() / wanted.norm()) < 1.5 * RIDGE


@pytest.mark.parametrize("count", [200, 1000])
def test_it_is_the_reduced_ridge_solution(count):
    """As solved for the columns, whether there are more rows or fewer."""
    width, rank = 320, rank_of(320)
    rows, missed = numbers(count, width), numbers(count, 100, seed=1)
    padded = torch.cat((rows, torch.ones(count, 1)), 1).double()
    damping = RIDGE * float(rows.square().sum()) / width
    ridge = torch.linalg.solve(
        padded.T @ padded + damping * torch.eye(width + 1, dtype=torch.float64), padded.T @ missed.double()
    )
    _, _, axes = torch.linalg.svd(padded @ ridge, full_matrices=False)
    wanted = padded @ ridge @ axes[:rank].T @ axes[:rank]
    torch.testing.assert_close(missed_by(rows, fit_correction(rows, missed)), wanted.float(), rtol=1e-3, atol=1e-3)


def test_rank_is_bounded_by_the_width_and_the_rows():
    assert rank_of(3584) == RANK
    assert rank_of(64) == 8
    assert rank_of(3) == 1
    assert fit_correction(numbers(300, 64), numbers(300, 9)).down.shape == (64, 8)
    assert fit_correction(numbers(5, 64), numbers(5, 9)).down.shape == (64, 5)


def test_it_is_added_to_the_prediction():
    rows, predicted = numbers(3, 16), numbers(3, 8, seed=1)
    correction = fit_correction(numbers(99, 16), numbers(99, 8, seed=2))
    torch.testing.assert_close(correction.corrected(rows, predicted), predicted + missed_by(rows, correction))


@pytest.mark.parametrize("rows", [torch.zeros(20, 16), torch.ones(20, 16)])
def test_rows_that_are_all_alike_give_finite_numbers(rows):
    assert missed_by(rows, fit_correction(rows, numbers(20, 8))).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_give_none(value):
    rows = numbers(20, 16)
    rows[3, 5] = value
    assert fit_correction(rows, numbers(20, 8)) is None
    assert fit_correction(numbers(20, 16), torch.full((20, 8), value)) is None
    assert fit_correction(numbers(20, 16), 1e25 * numbers(20, 8)) is None, "whose squares are not finite"


@pytest.mark.parametrize("count", [128, 130, 512])
def test_directions_that_are_not_there_are_not_made_up(count):
    """Where fewer than the rank explain all that is missed, rounding decides about the others."""
    rows = numbers(count, 896)
    for missed in (torch.full((count, 896), 3.0), rows @ numbers(896, 1, seed=1) @ numbers(1, 896, seed=2)):
        correction = fit_correction(rows, missed)
        assert float((missed_by(rows, correction) - missed).norm() / missed.norm()) < RIDGE
        assert float(correction.up.norm(dim=1).max()) < 1.001, "directions are of length 1"


def test_a_solution_that_does_not_converge_gives_none(monkeypatch):
    def fails(*_):
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    assert fit_correction(numbers(20, 16), numbers(20, 8)) is None
