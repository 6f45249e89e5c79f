"""FAISS results equal brute force, whatever the index and whichever ids are asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from storage.errors import StorageError
from storage.index import KINDS, build_index, read_index, search_index, write_index
from storage.manifest import Artefact
from storage.root import Root

RNG = np.random.default_rng(0)
# Norms vary over five orders of magnitude, as contributions' do.
VECTORS = (RNG.standard_normal((3000, 24)) * 10.0 ** RNG.uniform(-6, -1, (3000, 1))).astype(np.float32)
QUERIES = RNG.standard_normal((5, 24)).astype(np.float32)


def brute(queries: np.ndarray, k: int, ids: np.ndarray) -> list[np.ndarray]:
    """The ids of the largest products, by sorting them all."""
    products = queries.astype(np.float64) @ VECTORS[ids].T.astype(np.float64)
    return [ids[np.argsort(-row, kind="stable")[:k]] for row in products]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("some", [None, np.arange(40, 3000, 7), np.array([5])])
def test_results_equal_brute_force(tmp_path: Path, kind: str, sign: int, some: np.ndarray | None) -> None:
    artefact = Artefact(Root(str(tmp_path)))
    with artefact.attempt("index", {}) as attempt:
        write_index(attempt, build_index([VECTORS[:1000], VECTORS[1000:1000], VECTORS[1000:]], kind, 24))
    exact = None if kind == "flat" else (lambda ids: VECTORS[ids])
    found = search_index(read_index(artefact), sign * QUERIES, 50, some, exact)
    expected = brute(sign * QUERIES, 50, np.arange(3000) if some is None else some)
    for (scores, ids), truth, query in zip(found, expected, sign * QUERIES, strict=True):
        assert ids.tolist() == truth.tolist()
        np.testing.assert_allclose(scores, VECTORS[truth] @ query, rtol=1e-5)


def test_more_asked_than_there_are(tmp_path: Path) -> None:
    """FAISS pads short results with id -1; no such row may be seen."""
    index = build_index([VECTORS[:3]], "flat", 24)
    (scores, ids), *_ = search_index(index, QUERIES, 10)
    assert sorted(ids) == [0, 1, 2]
    assert len(scores) == 3


def test_an_empty_index_answers_with_nothing() -> None:
    for kind in KINDS:
        index = build_index([], kind, 24)
        assert all(len(ids) == 0 for _, ids in search_index(index, QUERIES, 10, None, lambda ids: VECTORS[ids]))


@pytest.mark.parametrize("size", [0, 10, 2000])
def test_a_truncated_index_is_one_sentence(tmp_path: Path, size: int) -> None:
    artefact = Artefact(Root(str(tmp_path)))
    with artefact.attempt("index", {}) as attempt:
        write_index(attempt, build_index([VECTORS], "flat", 24))
    path = Path(artefact.url("index.faiss"))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(StorageError, match=r"index\.faiss is damaged"):
        read_index(artefact)
