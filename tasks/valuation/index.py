"""The FAISS index of a stage's embeddings."""

from __future__ import annotations

from secateur.storage.attempt import Attempt
from secateur.storage.faiss_index import build_index, write_index
from secateur.tasks.results.valuation_results import read_embeddings
from secateur.tasks.run import Run


def index_stage(run: Run, stage: int) -> int:
    """Index a stage's embeddings. The ids are rows of its `scores.parquet`.

    Returns:
        Number of vectors.
    """
    folder = run.folder.stage(stage)

    def write(attempt: Attempt) -> None:
        parts = read_embeddings(folder.embeddings)
        vectors = (part.numpy() for part in parts if len(part))
        index = build_index(vectors, run.plan.index, parts[0].shape[1])
        write_index(attempt, index)
        attempt.facts.update(kind=run.plan.index, vectors=index.ntotal)

    inputs = {"embeddings": folder.embeddings.fingerprint}
    return int(folder.index.write_once("index", inputs, write).facts["vectors"])
