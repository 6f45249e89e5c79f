"""FAISS indexes of a stage's vectors by inner product. Their ids are rows of `scores.parquet`."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

import faiss
import numpy as np

from secateur.errors import StorageError
from secateur.storage.attempt import Attempt
from secateur.storage.faiss_layout import check_layout
from secateur.storage.outputs import Output

# FAISS's names for the values of a plan's `index`. All of them scan every vector, so that results
# are exact after rescoring.
INDEX_KINDS = {"flat": "Flat", "fp16": "SQfp16", "sq8": "SQ8"}
INDEX_FILE = "index.faiss"

# A quantized index rescores this many candidates for k results.
CANDIDATES_PER_RESULT = 4
EXTRA_CANDIDATES = 200
SEARCHED_TOGETHER = 1024  # vectors whose neighbours are searched in one call

VectorReader = Callable[[np.ndarray], np.ndarray]


def build_index(chunks: Iterable[np.ndarray], kind: str, width: int) -> faiss.Index:
    """Build an index of vectors.

    Args:
        chunks: arrays of shape `n width`. All are kept until the index is built, so give views of
            mapped files.
        kind: a key of `INDEX_KINDS`. A quantized index only chooses candidates, which
            `search_index` must rescore: sq8 divides the range of each coefficient into 256 steps,
            and fp16 scales vectors before storing them, because small values would lose precision.
        width: coefficients per vector.
    """
    arrays = list(chunks)
    index = faiss.index_factory(width, INDEX_KINDS[kind], faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(_coefficient_ranges(arrays, width))
    scale = np.float32(_half_precision_scale(arrays) if kind == "fp16" else 1)
    for array in arrays:
        index.add(np.ascontiguousarray(array, dtype=np.float32) * scale)
    return index


def _coefficient_ranges(arrays: list[np.ndarray], width: int) -> np.ndarray:
    """Return the minimum and maximum of each coefficient, of shape `2 width`.

    The quantizer learns nothing else from training vectors, so these two suffice.
    """
    filled = [array for array in arrays if len(array)]
    if not filled:
        return np.zeros((2, width), np.float32)
    minimum = np.min([array.min(0) for array in filled], 0)
    maximum = np.max([array.max(0) for array in filled], 0)
    return np.stack([minimum, maximum]).astype(np.float32)


def _half_precision_scale(arrays: list[np.ndarray]) -> float:
    """Return the power of two that brings the largest magnitude just below 2**15.

    The largest half-precision number is 65504, just below 2**16.
    """
    largest = max((float(np.abs(array).max()) for array in arrays if array.size), default=0.0)
    # This is also false for NaN.
    if largest > 0:
        _, exponent = np.frexp(largest)
        return 2.0 ** (15 - int(exponent))
    return 1.0


def write_index(attempt: Attempt, index: faiss.Index) -> None:
    """Write an index."""
    with attempt.open(INDEX_FILE) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(lambda data: file.write(data)))


def read_index(output: Output) -> faiss.Index:
    """Return an index, mapped from the local file or its cached copy.

    Raises:
        StorageError: the file is damaged.
    """
    try:
        with output.local(INDEX_FILE) as path:
            check_layout(path)
            return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except (RuntimeError, struct.error) as error:
        raise StorageError(
            f"{output.url(INDEX_FILE)} is damaged; restore it or run that step again"
        ) from error


def search_index(
    index: faiss.Index,
    queries: np.ndarray,
    k: int,
    ids: np.ndarray | None = None,
    exact: VectorReader | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the k vectors with the largest inner product for each query.

    Args:
        index: the index to search.
        queries: array of shape `m width`.
        k: number of results per query.
        ids: search only among these ids. All are searched if None.
        exact: returns the vectors of some ids. A quantized index needs it, to rescore its best
            4 k + 200 candidates.

    Returns:
        The scores and ids of each query, best first. There are fewer than k if fewer are searched.
    """
    assert exact is not None or isinstance(index, faiss.IndexFlat), (
        "a quantized index only chooses candidates"
    )
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    count = k if exact is None else CANDIDATES_PER_RESULT * k + EXTRA_CANDIDATES
    count = min(count, index.ntotal if ids is None else len(ids))
    # FAISS rejects a search for no results.
    if count == 0:
        return [(np.empty(0, np.float32), np.empty(0, np.int64)) for _ in queries]
    parameters = None
    if ids is not None:
        parameters = faiss.SearchParameters(sel=_selector(ids, index.ntotal))
    all_scores, all_ids = index.search(queries, count, params=parameters)
    results = []
    for query, scores, found_ids in zip(queries, all_scores, all_ids, strict=True):
        # FAISS pads short results with the id -1.
        valid = found_ids >= 0
        results.append(_best_results(scores[valid], found_ids[valid], query, k, exact))
    return results


def similar_pairs(vectors: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of all pairs whose inner product is above a least one.

    Both orders of a pair are returned. Every vector is compared with every other.

    Args:
        vectors: array of shape `n width`.
        least: products of pairs are above it.
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    index = build_index([vectors], "flat", vectors.shape[1])
    found = []
    for start in range(0, len(vectors), SEARCHED_TOGETHER):
        limits, _, ids = index.range_search(vectors[start : start + SEARCHED_TOGETHER], least)
        rows = np.repeat(np.arange(start, start + len(limits) - 1), np.diff(limits.astype(int)))
        found.append((rows[rows != ids], ids[rows != ids]))
    firsts, seconds = zip(*found, strict=True)
    return np.concatenate(firsts), np.concatenate(seconds)


def _selector(ids: np.ndarray, total: int) -> faiss.IDSelector:
    """Return a selector that admits `ids`, as a bitmap of one bit per id."""
    # FAISS's selector by a set would compute a hash for every vector.
    admitted = np.zeros(total, bool)
    admitted[ids] = True
    return faiss.IDSelectorBitmap(np.packbits(admitted, bitorder="little"))


def _best_results(
    scores: np.ndarray, ids: np.ndarray, query: np.ndarray, k: int, exact: VectorReader | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best results of one query, rescored if needed. Ties go to the smaller id."""
    if exact is not None and len(ids):
        scores = exact(ids) @ query
    order = np.lexsort((ids, -scores))[:k]
    return scores[order], ids[order]
