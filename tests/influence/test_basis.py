"""Bases against explicit projections of the whole contributions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.influence.basis import Basis
from secateur.influence.basis_fitting import EnergyFit, MomentFit
from secateur.influence.basis_kinds import basis_kind, restore_basis
from secateur.influence.bindings import Bindings, bind_layers
from secateur.influence.coordinate_basis import share_coefficients
from secateur.influence.hooks import capture_hooks, sample_gradients
from secateur.influence.random_basis import random_kronecker_basis
from tests.influence.oracle import one_by_one
from tests.influence.test_layers import Tied, squares


def fit_basis(kind: str, model: nn.Module, inputs: Tensor) -> tuple[Basis, Bindings]:
    bindings = bind_layers(model)
    if kind == "random":
        return random_kronecker_basis(bindings, 3, 1, torch.float64), bindings
    moments = MomentFit(bindings)
    energy = EnergyFit(bindings)
    with capture_hooks(bindings, moments.add if kind == "pca" else energy.add, len(inputs)):
        squares(model, inputs).mean().backward()
    if kind == "pca":
        return moments.basis(3, torch.float64), bindings
    return energy.basis(20), bindings


@pytest.mark.parametrize("kind", ["random", "pca", "coordinates"])
def test_reduced_contributions_are_projections_of_whole_ones(kind: str) -> None:
    torch.manual_seed(0)
    model = Tied().double()
    inputs = torch.randint(7, (5, 6))
    basis, bindings = fit_basis(kind, model, inputs)
    actual, losses = sample_gradients(lambda rows: squares(model, inputs[rows]), 5, bindings, basis)
    whole = one_by_one(model, squares, inputs)
    torch.testing.assert_close(losses, squares(model, inputs).detach())
    for i in range(5):
        start = 0
        for b, (block, span) in enumerate(zip(basis.blocks, basis.spans, strict=True)):
            matrix = whole[i, start : start + block.size].view(block.rows, block.cols)
            start += block.size
            torch.testing.assert_close(actual[i, span], basis.project_block(b, [matrix]))


@pytest.mark.parametrize("kind", ["random", "pca", "coordinates"])
def test_lift_is_the_transpose_of_project_and_columns_are_orthonormal(kind: str) -> None:
    torch.manual_seed(0)
    basis, _ = fit_basis(kind, Tied().double(), torch.randint(7, (5, 6)))
    coefficients = torch.randn(basis.size, dtype=torch.float64)
    torch.testing.assert_close(
        basis.project_tensors(basis.lift_to_tensors(coefficients)), coefficients
    )
    again = restore_basis(basis_kind(basis), basis.blocks, basis.tensors())
    torch.testing.assert_close(
        again.project_tensors(basis.lift_to_tensors(coefficients)), coefficients
    )


def test_pca_spans_the_leading_eigenvectors_of_the_moments() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    inputs = torch.randn(9, 6).double()
    basis, _ = fit_basis("pca", model, inputs)
    ones = torch.cat([inputs, torch.ones(9, 1).double()], 1)
    expected = torch.linalg.svd(ones).Vh[:3]
    inner = basis.tensors()["0.in"]
    torch.testing.assert_close(inner @ inner.T, expected.T @ expected)


def test_coordinates_are_the_entries_of_most_energy() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    inputs = torch.randn(9, 6).double()
    basis, _ = fit_basis("coordinates", model, inputs)
    energy = (one_by_one(model, squares, inputs) / 9).square().sum(0)
    assert set(basis.tensors()["0.entries"].tolist()) == set(
        energy.argsort(descending=True)[:20].tolist()
    )


def test_random_factors_differ_by_block_and_side() -> None:
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Linear(6, 6, bias=False))
    factors = random_kronecker_basis(bind_layers(model), 2, 0, torch.float64).tensors()
    assert not torch.allclose(factors["1.out"], factors["1.in"])
    assert not torch.allclose(factors["0.out"], factors["1.out"])


def test_pca_of_a_huge_side_is_refused() -> None:
    with pytest.raises(SecateurError, match="9000 x 2"):
        MomentFit(bind_layers(nn.Embedding(9000, 2)))


@pytest.mark.parametrize(
    ("sizes", "coefficients", "expected"),
    [
        ([2080, 330], 416, [208, 208]),
        ([2080, 100], 416, [316, 100]),
        ([5, 1000, 20, 400], 225, [5, 100, 20, 100]),
        ([5, 6], None, [5, 6]),
        ([5, 6], 100, [5, 6]),
        ([5, 6, 7], 2, [1, 1, 1]),
    ],
)
def test_blocks_share_a_budget_equally(
    sizes: list[int], coefficients: int | None, expected: list[int]
) -> None:
    assert share_coefficients(sizes, coefficients) == expected
