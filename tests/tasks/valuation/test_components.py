"""Embeddings in principal components, compared with numpy's SVD and with all coefficients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from secateur.tasks.results.valuation_results import read_embeddings, read_scores
from secateur.tasks.run import Run
from secateur.tasks.valuation.query import find_influential
from tests.tasks.small import curate_small, make_data, small_plan

COMMON: dict[str, Any] = {
    "dtype": "float64",
    "optimizer": {"kind": "adamw", "lr": 0.01, "at_stage": "carry"},
    "basis": {"kind": "coordinates", "numbers": 60},
    "score": {"estimate": "embedding", "horizon": "stage", "aggregate": "mean"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("components")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return curate_small(small_plan(folder, run="whole", **COMMON))


def stage_embeddings(run: Run, stage: int) -> np.ndarray:
    return torch.cat(read_embeddings(run.folder.stage(stage).embeddings)).numpy()


def test_components_keep_the_largest_singular_values(folder: Path, run: Run) -> None:
    reduced = curate_small(small_plan(folder, run="few", components=5, **COMMON))
    full = stage_embeddings(run, 0)
    kept = stage_embeddings(reduced, 0)
    left, values, _ = np.linalg.svd(full, full_matrices=False)
    assert kept.shape == (len(full), 5)
    np.testing.assert_allclose(
        kept @ kept.T, (left[:, :5] * values[:5] ** 2) @ left[:, :5].T, atol=1e-10 * values[0] ** 2
    )


def test_as_many_components_as_coefficients_change_nothing(folder: Path, run: Run) -> None:
    width = stage_embeddings(run, 0).shape[1]
    same = curate_small(small_plan(folder, run="same", components=width, **COMMON))
    runs = (same, run)
    for stage in (0, 1):
        found, expected = (read_scores(r, stage)["score_clean"].to_numpy() for r in runs)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
    for harmful in (False, True):
        hits, other = (find_influential(r, "clean", top=6, harmful=harmful) for r in runs)
        assert [hit.key for hit in hits] == [hit.key for hit in other]
        scores = [hit.score for hit in other]
        assert [hit.score for hit in hits] == pytest.approx(scores, rel=1e-4)
