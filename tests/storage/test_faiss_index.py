"""Tests of FAISS indexes: results equal brute force for every kind of index and any ids."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

from secateur.errors import StorageError
from secateur.storage.faiss_index import (
    INDEX_KINDS,
    build_index,
    read_index,
    search_index,
    write_index,
)
from secateur.storage.folder import Folder
from secateur.storage.outputs import Output

RNG = np.random.default_rng(0)
# The norms vary over five orders of magnitude, like those of contributions.
VECTORS = (RNG.standard_normal((3000, 24)) * 10.0 ** RNG.uniform(-6, -1, (3000, 1))).astype(
    np.float32
)
QUERIES = RNG.standard_normal((5, 24)).astype(np.float32)


def brute(queries: np.ndarray, k: int, ids: np.ndarray) -> list[np.ndarray]:
    """Return the ids of the largest products, by sorting all of them."""
    products = queries.astype(np.float64) @ VECTORS[ids].T.astype(np.float64)
    return [ids[np.argsort(-row, kind="stable")[:k]] for row in products]


@pytest.mark.parametrize("kind", INDEX_KINDS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("subset", [None, np.arange(40, 3000, 7), np.array([5])])
def test_results_equal_brute_force(
    tmp_path: Path, kind: str, sign: int, subset: np.ndarray | None
) -> None:
    output = Output(Folder(str(tmp_path)))
    with output.attempt("index", {}) as attempt:
        write_index(
            attempt, build_index([VECTORS[:1000], VECTORS[1000:1000], VECTORS[1000:]], kind, 24)
        )
    exact = None if kind == "flat" else (lambda ids: VECTORS[ids])
    results = search_index(read_index(output), sign * QUERIES, 50, subset, exact)
    expected = brute(sign * QUERIES, 50, np.arange(3000) if subset is None else subset)
    for (scores, ids), truth, query in zip(results, expected, sign * QUERIES, strict=True):
        assert ids.tolist() == truth.tolist()
        np.testing.assert_allclose(scores, VECTORS[truth] @ query, rtol=1e-5)


def test_fewer_vectors_than_requested(tmp_path: Path) -> None:
    """FAISS pads short results with the id -1, which must not be returned."""
    index = build_index([VECTORS[:3]], "flat", 24)
    (scores, ids), *_ = search_index(index, QUERIES, 10)
    assert sorted(ids) == [0, 1, 2]
    assert len(scores) == 3


def test_empty_index_returns_no_results() -> None:
    for kind in INDEX_KINDS:
        index = build_index([], kind, 24)
        assert all(
            len(ids) == 0
            for _, ids in search_index(index, QUERIES, 10, None, lambda ids: VECTORS[ids])
        )


@pytest.mark.parametrize("size", [0, 10, 2000])
def test_truncated_index_is_an_error(tmp_path: Path, size: int) -> None:
    output = Output(Folder(str(tmp_path)))
    with output.attempt("index", {}) as attempt:
        write_index(attempt, build_index([VECTORS], "flat", 24))
    path = Path(output.url("index.faiss"))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(StorageError, match=r"index\.faiss is damaged"):
        read_index(output)


FORGED = """
import sys
from secateur.errors import StorageError
from secateur.storage.faiss_index import read_index
from secateur.storage.outputs import Output
from secateur.storage.folder import Folder
for place in sys.argv[1:]:
    try:
        index = read_index(Output(Folder(place)))
        index.search(__import__("numpy").zeros((1, index.d), "float32"), 3)
        print("read")
    except StorageError:
        print("refused")
"""


@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_index_of_wrong_length_never_reaches_faiss(tmp_path: Path, kind: str) -> None:
    """FAISS maps the file and reads beyond its end, so a short header once ended the process.

    Here the manifests match the files, as if someone had forged both.
    """
    whole = faiss.serialize_index(build_index([VECTORS[:9]], kind, 24)).tobytes()
    forged = [whole[:n] for n in (0, 4, 29, 45, 60, len(whole) - 1)] + [whole + b"x"]
    forged += [
        whole[:at] + b"\xff\xff\xff\x7f" + whole[at + 4 :]
        for at in (0, 4, 8, 12, 37, 41, 49, 57, 65)
    ]
    places = []
    for number, data in enumerate([whole, *forged]):
        places.append(str(tmp_path / str(number)))
        with Output(Folder(places[-1])).attempt("index", {}) as attempt:
            attempt.write("index.faiss", data)
    done = subprocess.run(
        [sys.executable, "-c", FORGED, *places], capture_output=True, text=True, check=True
    )
    outcomes = done.stdout.split()
    assert len(outcomes) == len(places)
    assert outcomes[0] == "read"
    # The lengths, and the first fields of the header. The later fields are coefficients.
    assert outcomes[1:11] == ["refused"] * 10
