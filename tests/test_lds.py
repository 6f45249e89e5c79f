"""The measure of `benchmarks.lds`, and that it runs."""

from __future__ import annotations

import pytest
import torch

from benchmarks.lds import Protocol, datamodeling_score, draw_subsets, measure
from benchmarks.lds_estimates import sum_over_uses
from benchmarks.small_gpt2 import Size, make_text_training

TINY = Size(samples=16, questions=2, tokens=8, batch=8, epochs=2, layers=1, width=8, heads=2)


def test_true_scores_have_the_greatest_and_negated_ones_the_least_score() -> None:
    scores = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)).double()
    removed = draw_subsets(50, 20, 0.2, seed=0)
    # Each loss is that of the whole, plus what the samples left out were worth.
    losses = 5 + removed.double() @ scores.T
    assert datamodeling_score(scores, removed, losses) == pytest.approx(1)
    assert datamodeling_score(-scores, removed, losses) == pytest.approx(-1)
    scores[0] = 0
    assert datamodeling_score(scores, removed, losses) == pytest.approx(2 / 3)


def test_subsets_are_of_one_size_and_drawn_by_the_seed() -> None:
    subsets = draw_subsets(200, 6, 0.01, seed=3)
    assert subsets.sum(1).tolist() == [2] * 6
    assert torch.equal(subsets, draw_subsets(200, 6, 0.01, seed=3))
    assert not torch.equal(subsets, draw_subsets(200, 6, 0.01, seed=4))


def test_a_sample_scores_the_sum_over_its_uses() -> None:
    effects = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    batches = [torch.tensor([0, 2]), torch.tensor([2, 1])]
    assert sum_over_uses(effects, batches, 3).tolist() == [[1.0, 8.0, 6.0]]


def test_only_the_subset_differs_between_two_trainings() -> None:
    training = make_text_training(0, TINY)
    none = torch.zeros(16, dtype=torch.bool)
    one = none.clone()
    one[3] = True
    whole = training.retrain(none)
    assert torch.equal(whole, training.retrain(none))
    assert not torch.equal(whole, training.retrain(one))


def test_every_estimate_is_measured() -> None:
    rows = measure(0, TINY, Protocol(retrainings=4, fraction=0.1, top_questions=1), peers=None)
    assert len(rows) == 5
    replay = rows["replay"]
    assert isinstance(replay, dict)
    assert replay["agreement"] == pytest.approx(1)
    for row in rows.values():
        assert isinstance(row, dict)
        assert all(abs(row[name]) <= 1.001 for name in ("lds", "agreement") if name in row)
