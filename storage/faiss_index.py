"""Room `storage`: FAISS indexes of a stage's vectors, by inner product; ids are rows of `scores.parquet`."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import faiss
import numpy as np

from secateur.errors import StorageError
from secateur.storage.outputs import Attempt, Output

# What a plan's `index` stands for; all are scans, so that results are exact after rescoring.
INDEX_KINDS = {"flat": "Flat", "fp16": "SQfp16", "sq8": "SQ8"}
INDEX_FILE = "index.faiss"
# FAISS's own layout: kind, width, vectors, two unused, trained, metric; then of a quantiser its type, how it found its ranges,
# width, bytes a vector, and how many numbers its ranges are.
HEADER, QUANTISER = struct.Struct("<4siqqq?i"), struct.Struct("<iifQQQ")

Rows = Callable[[np.ndarray], np.ndarray]


def build_index(chunks: Iterable[np.ndarray], kind: str, width: int) -> faiss.Index:
    """An index of vectors.

    Args:
        chunks: arrays `n width`, all held while it is built: give views of mapped files.
        kind: one of `KINDS`. A quantised index chooses candidates, which `search_index` must score anew: sq8 spreads 256
            steps over the range of each number, and fp16 holds the vectors scaled, for small ones would lose digits.
    """
    held = list(chunks)
    index = faiss.index_factory(width, INDEX_KINDS[kind], faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(_ranges(held, width))
    scale = np.float32(_scale(held) if kind == "fp16" else 1)
    for chunk in held:
        index.add(np.ascontiguousarray(chunk, dtype=np.float32) * scale)
    return index


def _ranges(chunks: list[np.ndarray], width: int) -> np.ndarray:
    """`2 width`: the least and the greatest of each number, which is all that the quantiser learns from."""
    if not any(len(chunk) for chunk in chunks):
        return np.zeros((2, width), np.float32)
    least = np.min([chunk.min(0) for chunk in chunks if len(chunk)], 0)
    greatest = np.max([chunk.max(0) for chunk in chunks if len(chunk)], 0)
    return np.stack([least, greatest]).astype(np.float32)


def _scale(chunks: list[np.ndarray]) -> float:
    """The power of two that brings the largest magnitude just under the largest half-precision number."""
    largest = max((float(np.abs(chunk).max()) for chunk in chunks if chunk.size), default=0.0)
    return 2.0 ** (15 - int(np.frexp(largest)[1])) if largest > 0 else 1.0


def write_index(attempt: Attempt, index: faiss.Index) -> None:
    """Writes an index."""
    with attempt.open(INDEX_FILE) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(lambda data: file.write(data)))


def read_index(artefact: Output) -> faiss.Index:
    """Reads an index, mapped from its file where it is local.

    Raises:
        StorageError: the file is damaged.
    """
    try:
        with artefact.local(INDEX_FILE) as path:
            _check_layout(path)
            return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except (RuntimeError, struct.error) as error:
        raise StorageError(
            f"{artefact.url(INDEX_FILE)} is damaged; restore it or run that step again"
        ) from error


def _check_layout(path: Path) -> None:
    """Holds what the file declares against its length, for FAISS maps it and reads on beyond the end.

    Raises:
        RuntimeError, struct.error: it is none of `KINDS`, or of another length.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        kind, width, total, *_ = HEADER.unpack(file.read(HEADER.size))
        if kind == b"IxSQ":
            quantiser, _, _, again, per_vector, ranges = QUANTISER.unpack(file.read(QUANTISER.size))
            per_number = {faiss.ScalarQuantizer.QT_8bit: 1, faiss.ScalarQuantizer.QT_fp16: 2}.get(
                quantiser
            )
            whole = per_number is not None and again == width and per_vector == width * per_number
            whole = whole and ranges == (2 * width if per_number == 1 else 0)
            file.seek(4 * ranges, os.SEEK_CUR)
            unit, each = 1, per_vector
        else:
            whole, unit, each = kind == b"IxFI", 4, width
        (numbers,) = struct.unpack("<Q", file.read(8))
        if not (
            whole
            and width > 0
            and total >= 0
            and numbers == total * each
            and size == file.tell() + unit * numbers
        ):
            raise RuntimeError("its length is not what its header declares")


def search_index(
    index: faiss.Index,
    queries: np.ndarray,
    k: int,
    ids: np.ndarray | None = None,
    exact: Rows | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The k vectors with the largest inner product for each query.

    Args:
        queries: `m width`.
        ids: the ids among which to search; all if None.
        exact: gives the vectors of some ids; a quantised index needs it: its best 4 k + 200 are scored anew with them.

    Returns:
        For each query its scores and ids, best first; fewer than k where there are fewer.
    """
    assert exact is not None or isinstance(index, faiss.IndexFlat), (
        "a quantised index only chooses candidates"
    )
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    wide = k if exact is None else 4 * k + 200
    wide = min(wide, index.ntotal if ids is None else len(ids))
    if wide == 0:
        return [(np.empty(0, np.float32), np.empty(0, np.int64)) for _ in queries]
    parameters = None if ids is None else faiss.SearchParameters(sel=_selector(ids, index.ntotal))
    scores, found = index.search(queries, wide, params=parameters)
    return [
        _best(s[f >= 0], f[f >= 0], q, k, exact)
        for s, f, q in zip(scores, found, queries, strict=True)
    ]


def _selector(ids: np.ndarray, total: int) -> faiss.IDSelector:
    """Admits `ids`, by one bit an id: a set would take a hash a vector."""
    chosen = np.zeros(total, bool)
    chosen[ids] = True
    return faiss.IDSelectorBitmap(np.packbits(chosen, bitorder="little"))


def _best(
    scores: np.ndarray, ids: np.ndarray, query: np.ndarray, k: int, exact: Rows | None
) -> tuple[np.ndarray, np.ndarray]:
    """One query's k best, scored anew where the index is not exact; ties go to the smaller id."""
    if exact is not None and len(ids):
        scores = exact(ids) @ query
    order = np.lexsort((ids, -scores))[:k]
    return scores[order], ids[order]
