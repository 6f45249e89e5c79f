"""Sketches of second moments, against the exact eigenvectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.influence.moments import Moment, SketchedMoment, leading_eigenvectors

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def axes() -> Tensor:
    """Random orthonormal axes, shape `(3000, 3000)`."""
    torch.manual_seed(0)
    return torch.linalg.qr(torch.randn(3000, 3000, dtype=torch.float64)).Q


def test_a_moment_is_the_sum_of_squares() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(9, 5, dtype=torch.float64)
    places = torch.tensor([4, 0, 2])
    moment = Moment(5, torch.float64, CPU)
    moment.add(vectors, None)
    moment.add(vectors[:, :3], places)
    moment.add_diagonal(torch.arange(5.0))
    placed = torch.zeros(9, 5, dtype=torch.float64)
    placed[:, places] = vectors[:, :3]
    expected = vectors.T @ vectors + placed.T @ placed + torch.arange(5.0).double().diag()
    found = moment.leading_eigenvectors(2)
    torch.testing.assert_close(found, leading_eigenvectors(expected, 2))


def test_a_sketch_is_exact_if_the_rank_is_small() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(30, 500, dtype=torch.float64)
    places = torch.randperm(500)
    sketch = SketchedMoment(500, torch.float64, CPU, 8, 0)
    sketch.add(vectors[:20], None)
    sketch.add(vectors[20:], places)
    placed = torch.zeros(10, 500, dtype=torch.float64)
    placed[:, places] = vectors[20:]
    rows = torch.cat([vectors[:20], placed])
    found = sketch.leading_eigenvectors(8)
    exact = leading_eigenvectors(rows.T @ rows, 8)
    torch.testing.assert_close(found @ found.T, exact @ exact.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("power", "least"), [(0.5, 0.85), (1.0, 0.99), (2.0, 0.9999)])
def test_a_sketch_keeps_nearly_the_energy_of_the_best_subspace(
    axes: Tensor, power: float, least: float
) -> None:
    """Eigenvalues fall as `1 / i^power`. Word frequencies fall with a power of about 1."""
    values = torch.arange(1, 3001).double() ** -power
    rows = values.sqrt()[:, None] * axes.T
    sketch = SketchedMoment(3000, torch.float32, CPU, 16, 1)
    for part in rows.float().split(100):
        sketch.add(part, None)
    found = sketch.leading_eigenvectors(16).double()
    torch.testing.assert_close(found.T @ found, torch.eye(16).double())
    # The best subspace is that of the first 16 axes.
    assert float((rows @ found).square().sum() / values[:16].sum()) > least


def test_a_sketch_of_few_vectors_still_has_orthonormal_columns() -> None:
    sketch = SketchedMoment(300, torch.float32, CPU, 16, 0)
    sketch.add(torch.eye(300)[:3], None)
    found = sketch.leading_eigenvectors(16)
    torch.testing.assert_close(found.T @ found, torch.eye(16).double())
    assert float(found[:3].square().sum()) == pytest.approx(3.0, rel=1e-4)
