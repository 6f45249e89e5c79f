"""Scores from vectors, against explicit products one pair at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from secateur.influence.scoring import ROWS, mean_alignment, nearest_alignment


def draw(count: int, width: int = 7) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def cosine(a: Tensor, b: Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True)) / (
        math.hypot(*a) * math.hypot(*b)
    )


@pytest.mark.parametrize("temperature", [0.05, 0.1, 2.0])
def test_nearest_is_the_soft_largest_plus_the_soft_smallest_cosine(temperature: float) -> None:
    vectors = draw(11)
    targets = draw(5)
    for vector, actual in zip(
        vectors, nearest_alignment(vectors, targets, temperature), strict=True
    ):
        cosines = [cosine(vector, target) for target in targets]
        high = temperature * math.log(sum(math.exp(c / temperature) for c in cosines))
        low = temperature * math.log(sum(math.exp(-c / temperature) for c in cosines))
        assert float(actual) == pytest.approx(high - low, abs=1e-6)


def test_nearest_goes_from_the_extremes_to_the_mean() -> None:
    vectors = draw(6)
    targets = draw(5)
    cosines = torch.tensor([[cosine(v, t) for t in targets] for v in vectors], dtype=torch.float64)
    extremes = cosines.amax(1) + cosines.amin(1)
    torch.testing.assert_close(
        nearest_alignment(vectors, targets, 1e-3), extremes, atol=3e-3, rtol=0
    )
    torch.testing.assert_close(
        nearest_alignment(vectors, targets, 1e3), 2 * cosines.mean(1), atol=1e-3, rtol=0
    )


def test_nearest_ignores_lengths_and_changes_sign_with_the_vector() -> None:
    vectors = draw(6)
    targets = draw(5)
    actual = nearest_alignment(vectors, targets, 0.1)
    scaled = nearest_alignment(vectors * torch.arange(1, 7)[:, None], 1e-20 * targets, 0.1)
    torch.testing.assert_close(scaled, actual, atol=1e-5, rtol=0)
    torch.testing.assert_close(nearest_alignment(-vectors, targets, 0.1), -actual)
    assert nearest_alignment(torch.zeros(1, 7), targets, 0.1).item() == 0


def test_many_vectors_are_scored_like_few() -> None:
    vectors = draw(2 * ROWS + 3)
    targets = draw(5)
    chosen = torch.tensor([0, ROWS - 1, ROWS, 2 * ROWS + 2])
    torch.testing.assert_close(
        nearest_alignment(vectors, targets, 0.1)[chosen],
        nearest_alignment(vectors[chosen], targets, 0.1),
    )
    assert nearest_alignment(vectors[:0], targets, 0.1).shape == (0,)


def test_alignment_is_the_product_with_the_mean_gradient() -> None:
    vectors = draw(6)
    targets = draw(5)
    for vector, actual in zip(vectors, mean_alignment(vectors, targets), strict=True):
        products = [
            sum(float(x) * float(y) for x, y in zip(vector, target, strict=True))
            for target in targets
        ]
        assert float(actual) == pytest.approx(sum(products) / len(products))
