"""Embeddings in their principal components, against numpy's singular values and against all numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from secateur.tasks.run.run import Run
from secateur.tasks.valuation.embed import stage_embeddings
from secateur.tasks.valuation.query import find_influential
from secateur.tasks.valuation.score import read_scores
from tests.tasks.small import curate_small, make_data, small_plan

COMMON: dict[str, Any] = {
    "dtype": "float64",
    "optimizer": {"kind": "adamw", "lr": 0.01, "at_stage": "carry"},
    "basis": {"kind": "coordinates", "numbers": 60},
    "score": {"estimate": "embedding", "horizon": "stage", "aggregate": "mean"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("components")
    make_data(made)
    return made


@pytest.fixture(scope="module")
def whole(folder: Path) -> Run:
    return curate_small(small_plan(folder, run="whole", **COMMON))


def embeddings(run: Run, stage: int) -> np.ndarray:
    return torch.cat(stage_embeddings(run.folder.stage(stage).embeddings)).numpy()


def test_they_hold_the_largest_singular_values(folder: Path, whole: Run) -> None:
    few = curate_small(small_plan(folder, run="few", components=5, **COMMON))
    full, kept = embeddings(whole, 0), embeddings(few, 0)
    left, values, _ = np.linalg.svd(full, full_matrices=False)
    assert kept.shape == (len(full), 5)
    np.testing.assert_allclose(
        kept @ kept.T, (left[:, :5] * values[:5] ** 2) @ left[:, :5].T, atol=1e-10 * values[0] ** 2
    )


def test_as_many_as_there_are_numbers_change_nothing(folder: Path, whole: Run) -> None:
    width = embeddings(whole, 0).shape[1]
    run = curate_small(small_plan(folder, run="same", components=width, **COMMON))
    for stage in (0, 1):
        found, expected = (read_scores(r, stage)["score_clean"].to_numpy() for r in (run, whole))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
    for harmful in (False, True):
        found, expected = (
            find_influential.fn(r.url, "clean", top=6, harmful=harmful) for r in (run, whole)
        )
        assert [hit.key for hit in found] == [hit.key for hit in expected]
        assert [hit.score for hit in found] == pytest.approx(
            [hit.score for hit in expected], rel=1e-4
        )
