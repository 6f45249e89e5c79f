"""Reduced embeddings, compared with products of whole embeddings and numpy's singular vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from secateur.errors import PlanError
from secateur.tasks.plan import Plan
from secateur.tasks.results.valuation_results import (
    read_directions,
    read_embeddings,
    read_scores,
    read_target_gradients,
    read_transition,
)
from secateur.tasks.run import Run
from secateur.tasks.valuation import embed_reduced
from secateur.tasks.valuation.dynamics import read_segment
from secateur.tasks.valuation.embedding_space import share_in_embeddings
from secateur.tasks.valuation.query import find_influential, stage_queries
from tests.tasks.small import curate_small, make_data, small_plan

COMMON: dict[str, Any] = {
    "dtype": "float64",
    "optimizer": {"kind": "adamw", "lr": 0.01},
    "basis": {"kind": "coordinates", "numbers": 60},
    "score": {"estimate": "embedding", "horizon": "stage", "aggregate": "mean"},
}
FEW = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("components")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Run:
    return curate_small(
        small_plan(
            folder,
            run="whole",
            curvature={"kind": "empirical_fisher", "coupling": "full"},
            **COMMON,
        )
    )


def stage_embeddings(run: Run, stage: int) -> np.ndarray:
    return torch.cat(read_embeddings(run.folder.stage(stage).embeddings)).numpy()


def reduced_plan(folder: Path, **changes: Any) -> Plan:
    return small_plan(folder, components=FEW, **(COMMON | changes))


@pytest.fixture(scope="module")
def reduced(folder: Path) -> Run:
    """It is embedded in groups of seven directions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed_reduced, "GROUP_ELEMENTS", 7 * 3 * 60)
        return curate_small(reduced_plan(folder, run="few"))


def test_directions_are_the_leading_singular_vectors(reduced: Run) -> None:
    for stage in (0, 1):
        folder = reduced.folder.stage(stage)
        segments = [read_segment(ledger) for ledger in folder.segments()]
        gradients = torch.cat([s.contributions[s.selected] for s in segments]).numpy()
        assert len(gradients) > 2 * FEW  # so only some are read
        chosen = gradients[np.linspace(0, len(gradients) - 1, 2 * FEW).round().astype(int)]
        chosen /= np.linalg.norm(chosen, axis=1, keepdims=True)
        expected = np.linalg.svd(chosen)[2][:FEW]
        found = read_directions(reduced, stage).numpy()
        np.testing.assert_allclose(found @ found.T, expected.T @ expected, atol=1e-8)


def test_reduced_embeddings_are_the_whole_ones_along_the_directions(
    whole: Run, reduced: Run
) -> None:
    expected = stage_embeddings(whole, 0) @ read_directions(reduced, 0).numpy()
    np.testing.assert_allclose(stage_embeddings(reduced, 0), expected, atol=1e-10)


def test_scores_are_of_the_part_of_a_gradient_that_the_directions_hold(
    whole: Run, reduced: Run
) -> None:
    directions = read_directions(reduced, 0)
    gradient = read_target_gradients(reduced, 0, "clean").mean(0)
    held = (directions @ (directions.T @ gradient)).numpy()
    found = read_scores(reduced, 0)["score_clean"].to_numpy()
    np.testing.assert_allclose(found, stage_embeddings(whole, 0) @ held, rtol=1e-6, atol=1e-12)


def test_the_share_that_embeddings_hold(reduced: Run) -> None:
    gradient = read_target_gradients(reduced, 0, "clean")[:1]
    held = (read_directions(reduced, 0).T @ gradient[0]).square().sum() / gradient.square().sum()
    assert 0 < held < 1
    assert share_in_embeddings(reduced, 0, gradient) == pytest.approx(float(held))
    answer = find_influential(reduced, "clean", stage=1)
    pulled = find_influential(reduced, "clean", stage=1, estimate="pull_back")
    assert answer.held is not None
    assert pulled.held is not None
    mean = read_target_gradients(reduced, 1, "clean").mean(0, keepdim=True)
    part = (read_directions(reduced, 1).T @ mean[0]).square().sum() / mean.square().sum()
    assert answer.held / pulled.held == pytest.approx(float(part))


def test_questions_reach_the_stage_before(reduced: Run) -> None:
    gradients = read_target_gradients(reduced, 1, "clean")[:3]
    (last, at_end), (first, before) = stage_queries(reduced, [0, 1], gradients)
    assert (last, first) == (1, 0)
    np.testing.assert_allclose(at_end, gradients.numpy() @ read_directions(reduced, 1).numpy())
    # By hand: the later stage's directions go back through all of its steps.
    (transition,) = read_transition(reduced.folder.stage(1).embeddings)
    earlier = at_end @ transition[:, 0].numpy() @ read_directions(reduced, 0).numpy()
    np.testing.assert_allclose(before, earlier)


def test_as_many_components_as_coefficients_change_nothing(folder: Path, whole: Run) -> None:
    same = curate_small(small_plan(folder, run="same", components=60, **COMMON))
    for stage in (0, 1):
        np.testing.assert_array_equal(stage_embeddings(same, stage), stage_embeddings(whole, stage))


def test_directions_across_blocks_that_are_not_coupled(folder: Path) -> None:
    uncoupled: dict[str, Any] = {"curvature": {"kind": "empirical_fisher", "coupling": "block"}}
    few = curate_small(reduced_plan(folder, run="few-block", **uncoupled))
    blocks = curate_small(small_plan(folder, run="whole-block", **COMMON, **uncoupled))
    expected = stage_embeddings(blocks, 0) @ read_directions(few, 0).numpy()
    np.testing.assert_allclose(stage_embeddings(few, 0), expected, atol=1e-10)


def test_a_carried_state_is_refused(folder: Path) -> None:
    carried = {"optimizer": {"kind": "adamw", "lr": 0.01, "at_stage": "carry"}}
    with pytest.raises((PlanError, ValueError), match="leave out `components`"):
        reduced_plan(folder, run="carried", **carried)
