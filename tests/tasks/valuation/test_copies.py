"""Copies: exact ones by content, near ones by gradients at one state of the model."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from secateur.flows.stage import train_stage
from secateur.influence.similarity import whiten_directions
from secateur.storage.faiss_index import similar_pairs
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.run import Run
from secateur.tasks.training.loop import TrainingLoop
from secateur.tasks.valuation import copies
from secateur.tasks.valuation.copies import count_copies, find_copies
from secateur.tasks.valuation.query import find_influential
from tests.tasks.small import INLINE, curate_small, make_data, sample, small_plan

RNG = np.random.default_rng(0)
EXACT, NEAR = (3, 20, 21), (40, 41, 60)


def nearly(number: int) -> dict[str, Any]:
    """A digit with a little noise in its pixels."""
    pixels = np.frombuffer(sample(number)["raw"], np.float32)
    noisy = pixels + RNG.normal(0, 0.01, 64).astype(np.float32)
    return {**sample(number), "raw": noisy.tobytes(), "__key__": f"near-{number}"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three digits occur twice, the first of them three times, and three more nearly so."""
    folder = tmp_path_factory.mktemp("copies")
    again = [{**sample(number), "__key__": f"exact-{number}"} for number in (*EXACT, EXACT[0])]
    again[-1]["__key__"] = "again"
    make_data(folder, [*again, *map(nearly, NEAR)])
    basis = {"kind": "kronecker", "method": "pca", "rank": 12, "fit_steps": 3}
    return curate_small(small_plan(folder, basis=basis, stages=[{"epochs": 3, "batch_size": 20}]))


def expected_groups() -> list[set[str]]:
    exact = [{f"digit-{n:04d}", f"exact-{n}"} for n in EXACT]
    exact[0].add("again")
    return [*exact, *({f"digit-{n:04d}", f"near-{n}"} for n in NEAR)]


def groups_of(frame: pl.DataFrame) -> list[set[str]]:
    return [set(part["key"]) for part in frame.partition_by("group", maintain_order=True)]


def test_a_query_counts_exact_copies_before_they_are_sought(run: Run) -> None:
    counts = {hit.key: hit.copies for hit in find_influential(run, "clean", top=200).hits}
    expected = {key: len(group) - 1 for group in expected_groups()[:3] for key in group}
    assert {key: count for key, count in counts.items() if count} == expected
    assert len(counts) == 147


def test_planted_copies_are_found_and_nothing_else(run: Run) -> None:
    found = find_copies(run, 0)
    assert sorted(groups_of(found), key=min) == sorted(expected_groups(), key=min)
    same = found.filter(pl.col("exact").is_duplicated())
    assert set(same["key"]) == set.union(*expected_groups()[:3])
    expected = {key: len(group) - 1 for group in expected_groups() for key in group}
    assert count_copies(run, 0) == expected
    assert {hit.key: hit.copies for hit in find_influential(run, "clean", top=200).hits}[
        "near-40"
    ] == 1


def test_less_similar_samples_join_groups(run: Run) -> None:
    few, many = find_copies(run, 0, 0.98), find_copies(run, 0, 0.4)
    assert len(few) < len(many)
    for group in groups_of(few):
        assert any(group <= larger for larger in groups_of(many))


def test_copies_are_sought_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_copies(run, 0, 0.9)
    monkeypatch.setattr(TrainingLoop, "__init__", None)
    assert find_copies(run, 0, 0.9).equals(first)


def test_pairs_are_those_of_the_whole_matrix_of_products() -> None:
    vectors = RNG.standard_normal((2500, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    firsts, seconds = similar_pairs(vectors, 0.97)
    products = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    np.fill_diagonal(products, 0)
    found = set(zip(firsts.tolist(), seconds.tolist(), strict=True))
    surely = {tuple(pair) for pair in np.argwhere(products > 0.97 + 1e-6).tolist()}
    maybe = {tuple(pair) for pair in np.argwhere(products > 0.97 - 1e-6).tolist()}
    assert surely <= found <= maybe
    assert len(found) > 100


def test_whitening_equals_the_inverse_root_of_the_second_moment() -> None:
    """With few coefficients no component is left out, so numpy can compute it directly."""
    gradients = RNG.standard_normal((400, 12)) * 2.0 ** np.arange(12) + 30
    found = whiten_directions(torch.from_numpy(gradients)).double().numpy()
    units = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    centered = units - units.mean(0)
    values, vectors = np.linalg.eigh(centered.T @ centered / 400)
    root = vectors @ np.diag((values + 1e-4 * values.max()) ** -0.5) @ vectors.T
    expected = centered @ root
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=2e-4)


def test_samples_without_a_gradient_are_like_no_other() -> None:
    gradients = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    gradients[:3] = 0
    vectors = whiten_directions(gradients)
    assert all(float(vectors[a] @ vectors[b]) == 0 for a, b in combinations(range(3), 2))


def test_a_list_of_an_earlier_version_shows_no_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data(tmp_path, [{**sample(3), "__key__": "again"}])
    run = Run.start(small_plan(tmp_path))
    train_stage(INLINE, run.url, 0)
    assert count_copies(run, 0) == {"digit-0003": 1, "again": 1}

    def without_content(run: Run, stage: int) -> Any:
        samples = read_stage_samples(run, stage)
        samples.frame = samples.frame.drop("content")
        return samples

    monkeypatch.setattr(copies, "read_stage_samples", without_content)
    assert count_copies(run, 0) == {}
