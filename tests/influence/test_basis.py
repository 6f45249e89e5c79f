"""Bases against explicit projections of the whole contributions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateur.influence import basis_fitting, random_basis
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
    moments = MomentFit(bindings, 3)
    energy = EnergyFit(bindings)
    with capture_hooks(bindings, moments.add if kind == "pca" else energy.add, len(inputs)):
        squares(model, inputs).mean().backward()
    if kind == "pca":
        return moments.basis(torch.float64), bindings
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


def test_pca_of_a_table_takes_the_rows_of_most_energy() -> None:
    """The second moment of one-hot vectors is diagonal. A sketch of the long side finds it."""
    torch.manual_seed(0)
    table = nn.Embedding(9000, 4)
    inputs = torch.tensor([[5, 5, 5, 5, 8000, 8000, 77]])
    bindings = bind_layers(table)
    fit = MomentFit(bindings, 2)
    with capture_hooks(bindings, fit.add, 1):
        table(inputs).sum().backward()
    out = fit.basis(torch.float32).tensors()["0.out"]
    assert out.shape == (9000, 2)
    torch.testing.assert_close(out[5, 0], torch.tensor(1.0))
    torch.testing.assert_close(out[8000, 1], torch.tensor(1.0))
    assert not any(tensor.numel() > 9000 * 80 for tensor in vars(fit._left[0]).values())


def test_the_sums_of_float32_models_are_float32() -> None:
    bindings = bind_layers(nn.Linear(6, 4))
    assert EnergyFit(bindings)._energy[0].dtype == torch.float32
    assert EnergyFit(bind_layers(nn.Linear(6, 4).double()))._energy[0].dtype == torch.float64


@pytest.mark.parametrize("count", [1, 7, 40, 99, 100, 200])
def test_the_largest_entries_are_those_of_one_stable_sort(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(basis_fitting, "SORTED_ENTRIES", 13)
    values = torch.randint(12, (100,), generator=torch.Generator().manual_seed(count)).float()
    expected = values.argsort(descending=True, stable=True)[:count].sort().values
    assert torch.equal(basis_fitting.largest_entries(values, count), expected)


@pytest.mark.parametrize("count", [1, 3, 20, 40, 10_000, None])
def test_coordinates_are_those_of_most_energy_over_all_blocks(count: int | None) -> None:
    """At least one is of each block, and all others have no more energy than those chosen."""
    torch.manual_seed(0)
    last = nn.Linear(5, 4)
    last.weight.data.mul_(0.01)  # so that little energy reaches the first layer
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), last).double()
    bindings = bind_layers(model)
    inputs = torch.randn(7, 6, dtype=torch.float64)
    fit = EnergyFit(bindings)
    with capture_hooks(bindings, fit.add, 7):
        squares(model, inputs).sum().backward()
    whole = one_by_one(model, squares, inputs)
    energy = whole.square().sum(0).split([block.size for block in bindings.blocks])
    entries = list(fit.basis(count).tensors().values())
    taken = sum(map(len, entries))
    assert taken == (whole.shape[1] if count is None else min(max(count, 2), whole.shape[1]))
    assert all(len(own) for own in entries)
    chosen, left = [], [0.0]
    for values, own in zip(energy, entries, strict=True):
        first = int(values.argmax())
        assert first in own.tolist()
        chosen += [float(values[n]) for n in own.tolist() if n != first]
        left += [float(values[n]) for n in range(len(values)) if n not in own.tolist()]
    assert not chosen or min(chosen) >= max(left)


def test_entries_of_a_large_block_are_drawn_without_a_permutation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(random_basis, "LARGEST_PERMUTATION", 100)
    bindings = bind_layers(nn.Linear(40, 30))
    (entries,) = random_basis.random_coordinates(bindings, 200, 0).tensors().values()
    assert len(entries.unique()) == 200
    assert int(entries.min()) >= 0
    assert int(entries.max()) < 30 * 41
    # Evenly over the block: the mean of 200 of 1,230 lies within 5 standard errors of the middle.
    assert float(entries.double().mean()) == pytest.approx(614.5, abs=5 * 355 / 200**0.5)


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
